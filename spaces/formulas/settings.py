"""Settings of the space `formula`, and the space that they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from secateur.spaces.formulas.known import known_tree
from secateur.spaces.formulas.operators import OPERATORS
from secateur.spaces.formulas.random_trees import Palette
from secateur.spaces.formulas.space import FormulaSpace
from secateur.spaces.formulas.tree import Bounds
from secateur.spaces.section import Section
from secateur.spaces.shape import ModelShape, Prunable, split_protected


class ProxySettings(Section):
    """A closed form that foretells how formulas rank: the error of some layers' outputs, without a forward pass.

    Args:
        blocks: of the model, evenly spread; second moments of their inputs are kept on the disk.
        rows: of each linear of these, evenly spread.
        gram: ``full`` second moments, or their ``diagonal``: cheaper, and a little less like the true loss.
    """

    blocks: int = Field(default=8, gt=0)
    rows: int = Field(default=32, gt=1)
    gram: Literal["full", "diagonal"] = "full"


class CaseSettings(Section):
    """Where else a formula is measured; what is not named is as in the space's own settings.

    Args:
        model: another model.
        target: another sparsity of each linear.
        group_size: patterns instead of rows or layers.
        comparison: which weights compete.
    """

    model: str | None = Field(default=None, min_length=1)
    target: float | None = Field(default=None, gt=0, lt=1)
    group_size: int | None = Field(default=None, gt=1)
    comparison: Literal["output", "layer"] | None = None

    @property
    def name(self) -> str:
        """What it names, such as ``target=0.6`` or ``model=tiny,target=0.6``."""
        return ",".join(f"{name}={value}" for name, value in self.model_dump(exclude_none=True).items())

    @model_validator(mode="after")
    def _check(self) -> CaseSettings:
        if not self.name:
            raise ValueError(
                "Expected each of `also` to name a model, target, group_size or comparison, got none."
            )
        return self


class FormulaSettings(Section):
    """What can be searched: the formula of an importance metric, at one sparsity for all linears.

    Args:
        target: sparsity of each linear that is not protected.
        terminals: quantities that formulas are made of; what they need is collected once.
        operators: names of operators; None: all.
        constants: share of leaves that are numbers, in random formulas.
        depth: of the deepest formula.
        size: nodes of the largest formula.
        known: names of published formulas, and formulas of one's own such as ``formula: abs(W) * X``, that are
            measured first and that a search may start from.
        group_size: with it, patterns: so many neighbouring weights of a row lose the target's share.
        protect: patterns (``*`` and ``?``) of full names of linears that stay dense.
        comparison: which weights compete: those of an ``output`` or of the whole ``layer``.
        statistics: of exported models: ``sequential`` (collected behind pruned blocks) or ``dense`` (of the dense
            model).
        damp: share of the mean diagonal that is added to Hessians (H).
        proxy: what foretells how formulas rank; None: nothing.
        also: other models, sparsities and patterns where each formula is measured, too: the loss is then the geometric
            mean over all of them of the ratio to the loss of the first of `known`.
    """

    renamed: ClassVar[Mapping[str, str]] = {"calibration": "statistics"}

    kind: Literal["formula"] = "formula"
    target: float = Field(default=0.5, gt=0, lt=1)
    terminals: tuple[str, ...] = ("W", "G", "X")
    operators: tuple[str, ...] | None = None
    constants: float = 0.1
    depth: int = Field(default=8, ge=2)
    size: int = Field(default=24, ge=3)
    known: tuple[str, ...] = ("wanda", "magnitude", "pruner-zero", "gblm")
    group_size: int | None = Field(default=None, ge=2)
    protect: list[str] = Field(default=[])
    comparison: Literal["output", "layer"] = "output"
    statistics: Literal["sequential", "dense"] = "sequential"
    damp: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    proxy: ProxySettings | None = ProxySettings()
    also: tuple[CaseSettings, ...] = ()

    changeable: ClassVar[tuple[str, ...]] = ("statistics",)
    """May change when a search is continued: a candidate does not name its target."""

    @field_validator("known")
    @classmethod
    def _check_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("Expected `known` to name a formula, got none.")
        for name in names:
            known_tree(name)  # refuses what is none
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _check(self) -> FormulaSettings:
        _ = self.palette
        names = [case.name for case in self.also]
        if len(set(names)) < len(names):
            raise ValueError(f"Expected each of `also` once, got {names}.")
        return self

    @property
    def palette(self) -> Palette:
        """What random formulas are made of."""
        return Palette(
            self.terminals, tuple(OPERATORS) if self.operators is None else self.operators, self.constants
        )

    def at(self, case: CaseSettings) -> FormulaSettings:
        """The settings of one other model, sparsity and pattern alone."""
        changes = case.model_dump(exclude_none=True, exclude={"model"})
        return self.model_copy(update={**changes, "also": ()})

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
