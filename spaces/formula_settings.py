"""Settings of the space `formula`, and the space that they describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from secateur.spaces.cost import ModelShape
from secateur.spaces.formula import FormulaSpace
from secateur.spaces.formulas.known import KNOWN
from secateur.spaces.formulas.operators import OPERATORS
from secateur.spaces.formulas.sampling import Palette
from secateur.spaces.formulas.tree import Bounds
from secateur.spaces.units import Prunable, split_protected


class FormulaSettings(BaseModel):
    """What can be searched: the formula of an importance metric, at one sparsity for all linears.

    Args:
        target: sparsity of each linear that is not protected.
        terminals: quantities that formulas are made of; what they need is collected once.
        operators: names of operators; None: all.
        constants: share of leaves that are numbers, in random formulas.
        depth: of the deepest formula.
        size: nodes of the largest formula.
        known: published formulas that are measured first, and that a search may start from.
        group_size: with it, patterns: so many neighbouring weights of a row lose the target's share.
        protect: patterns (``*`` and ``?``) of full names of linears that stay dense.
        comparison: which weights compete: those of an ``output`` or of the whole ``layer``.
        calibration: statistics of the exported model from ``sequential``ly pruned blocks or from the dense
            model.
        damp: share of the mean diagonal that is added to Hessians (H).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["formula"] = "formula"
    target: float = 0.5
    terminals: tuple[str, ...] = ("W", "G", "X")
    operators: tuple[str, ...] | None = None
    constants: float = 0.1
    depth: int = 8
    size: int = 24
    known: tuple[str, ...] = ("wanda", "magnitude", "pruner-zero", "gblm")
    group_size: int | None = None
    protect: list[str] = []
    comparison: Literal["output", "layer"] = "output"
    calibration: Literal["sequential", "dense"] = "sequential"
    damp: float = 0.01

    @field_validator("known")
    @classmethod
    def _check_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in KNOWN]
        if unknown or not names:
            raise ValueError(f"Expected `known` out of {', '.join(KNOWN)}, got {unknown or 'none'}.")
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _check(self) -> FormulaSettings:
        if not 0 < self.target < 1:
            raise ValueError(f"Expected `target` within (0, 1), got {self.target}.")
        if not self.damp > 0:
            raise ValueError(f"Expected `damp` > 0, got {self.damp}.")
        if self.depth < 2 or self.size < 3:
            raise ValueError(
                f"Expected `depth` >= 2 and `size` >= 3, got {self.depth} and {self.size}: abs(W) * X has 3 levels "
                f"and 4 nodes."
            )
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(f"Expected `group_size` >= 2, got {self.group_size}.")
        _ = self.palette
        return self

    @property
    def palette(self) -> Palette:
        """What random formulas are made of."""
        return Palette(
            self.terminals, tuple(OPERATORS) if self.operators is None else self.operators, self.constants
        )

    @property
    def targets(self) -> tuple[float, ...]:
        """The one target."""
        return (self.target,)


def build_formula(settings: FormulaSettings, linears: Sequence[Prunable], shape: ModelShape) -> FormulaSpace:
    """The space that the settings describe, for a model with these linears.

    Raises:
        ValueError: if a pattern in `protect` matches nothing or too much, or no published formula fits the bounds
            and terminals.
    """
    free, protected = split_protected(linears, settings.protect)
    return FormulaSpace(
        free,
        protected,
        settings.target,
        shape,
        bounds=Bounds(settings.depth, settings.size),
        palette=settings.palette,
        known=settings.known,
    )
