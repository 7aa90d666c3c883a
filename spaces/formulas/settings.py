"""Settings of the space `formula`, and its construction from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from secateur.spaces.formulas.known import known_tree
from secateur.spaces.formulas.operators import OPERATORS
from secateur.spaces.formulas.random_trees import Palette
from secateur.spaces.formulas.space import FormulaSpace
from secateur.spaces.formulas.tree import Bounds
from secateur.spaces.method import Comparison
from secateur.spaces.section import Section
from secateur.spaces.shape import ModelShape, Prunable, split_protected
from secateur.spaces.space_settings import SpaceSettings


class ProxySettings(Section):
    """Proxy for the loss of formulas: output errors of some layers in closed form, without a forward pass.

    Args:
        blocks: number of evenly spread blocks; the second moments of their inputs are stored on disk.
        rows: number of evenly spread rows of each of their linears.
        gram: ``full`` second moments, or their ``diagonal``, which is cheaper and slightly less accurate.
        by: relative errors of the ``output``, or the loss that the ``curvature`` foretells from them, which takes a
            backward pass over few calibration tokens.
    """

    blocks: int = Field(default=8, gt=0)
    rows: int = Field(default=32, gt=1)
    gram: Literal["full", "diagonal"] = "full"
    by: Literal["output", "curvature"] = "output"

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain values; without `by` at its default, as in studies from before there was such a key."""
        plain: dict[str, Any] = handler(self)
        if self.by == "output":
            del plain["by"]
        return plain


class CaseSettings(Section):
    """Further case on which formulas are measured; keys that are not given are as in the space's settings.

    Args:
        model: another model.
        target: another sparsity of each linear.
        group_size: of patterns.
        comparison: weights that are ranked together.
    """

    model: str | None = Field(default=None, min_length=1)
    target: float | None = Field(default=None, gt=0, lt=1)
    group_size: int | None = Field(default=None, gt=1)
    comparison: Comparison | None = None

    @property
    def name(self) -> str:
        """Text of the given keys, such as ``target=0.6`` or ``model=tiny,target=0.6``."""
        return ",".join(f"{name}={value}" for name, value in self.model_dump(exclude_none=True).items())

    @model_validator(mode="after")
    def _check(self) -> CaseSettings:
        if not self.name:
            raise ValueError(
                "Expected each of `also` to name a model, target, group_size or comparison, got none."
            )
        return self


class FormulaSettings(SpaceSettings):
    """Settings of the space `formula`: an importance metric as an expression, at one sparsity of all linears.

    Args:
        target: sparsity of each linear that is not protected.
        terminals: quantities in formulas; their statistics are collected once.
        operators: names of operators; None: all.
        constants: share of constants among the leaves of random formulas.
        depth: largest depth of a formula.
        size: largest number of nodes.
        known: published formulas by name, or formulas such as ``formula: abs(W) * X``, measured first and used as
            starting points.
        group_size: size of patterns: the target's share of each group of neighbouring weights of a row is pruned.
        protect: patterns (``*`` and ``?``) of full names of linears kept dense.
        comparison: weights that are ranked together: those of an ``output`` or of the whole ``layer``.
        statistics: of exported models: ``sequential`` (collected behind pruned blocks) or ``dense`` (of the dense
            model).
        dampening: share of the mean diagonal added to Hessians (H).
        proxy: for screening; None: no screening.
        also: further models, sparsities and patterns on which each formula is measured: the loss is then the geometric
            mean, over all cases, of the ratio to the loss of the first of `known`.
    """

    renamed: ClassVar[Mapping[str, str]] = {"calibration": "statistics", "damp": "dampening"}

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
    comparison: Comparison = "output"
    statistics: Literal["sequential", "dense"] = "sequential"
    dampening: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    proxy: ProxySettings | None = ProxySettings()
    also: tuple[CaseSettings, ...] = ()

    changeable: ClassVar[tuple[str, ...]] = ("statistics",)
    """Keys that may change when a search is continued; the target may not, since candidates do not name it."""

    @field_validator("known")
    @classmethod
    def _check_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("Expected `known` to name a formula, got none.")
        for name in names:
            known_tree(name)  # raises for an unknown name
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
        return Palette(
            self.terminals, tuple(OPERATORS) if self.operators is None else self.operators, self.constants
        )

    def at(self, case: CaseSettings | None) -> FormulaSettings:
        """Settings of one further case alone; None: of the main one."""
        changes = {} if case is None else case.model_dump(exclude_none=True, exclude={"model"})
        return self.model_copy(update={**changes, "also": ()})

    @property
    def cases(self) -> Sequence[CaseSettings]:
        return self.also

    @property
    def has_proxy(self) -> bool:
        return self.proxy is not None

    @property
    def export_statistics(self) -> str:
        return self.statistics

    @property
    def targets(self) -> tuple[float, ...]:
        return (self.target,)


def build_formula(settings: FormulaSettings, linears: Sequence[Prunable], shape: ModelShape) -> FormulaSpace:
    """The space of these settings, for a model with these linears.

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
