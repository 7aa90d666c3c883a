"""Settings of the space `allocation`, and its construction from them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.formulas.metric import MetricName
from secateur.spaces.levels import Sparsities, levels_around, levels_by_weights
from secateur.spaces.method import Comparison
from secateur.spaces.shape import Granularity, ModelShape, Prunable, group, split_protected
from secateur.spaces.space_settings import SpaceSettings, Target, targets_of


class AllocationSettings(SpaceSettings):
    """Settings of the space `allocation`: a level of sparsity for each linear, sub-layer or block.

    Args:
        metric: importance metric of weights: its name, or a formula such as ``formula: abs(W) * X`` (or
            ``{formula: abs(W) * X}``).
        granularity: unit with one level: ``linear``, ``sublayer`` or ``block``.
        target: sparsity over all prunable weights, protected ones included; one value, a list, or a range.
        step: distance of the levels.
        max_sparsity: highest level.
        group_size: if given, levels are 0, 1, ... zeros in each group of this many neighbouring weights of a row (a
            pattern), and ``step`` is ignored.
        step_weights: if given, the levels of every linear are this number of weights apart, counted from the lowest
            target, so that any two linears can exchange a level; ``step`` is ignored.
        around: with ``step_weights``: levels below the lowest target and above the highest one; None: all up to
            ``max_sparsity``.
        protect: patterns (``*`` and ``?``) of full names of linears kept dense.
        comparison: weights that are ranked together: those of an ``output`` or of the whole ``layer``; None: the
            metric's default.
        statistics: ``sequential`` and ``dense``: levels from the dense model's, exports from those behind pruned
            blocks or the dense model's again. ``expected``: levels and exports from those behind blocks at the uniform
            allocation of the target, of several the middle one (of an even number the lower), see `expected_share`.
        refine: further stages, each a search among nine levels at half the step around what the one before found, with
            statistics behind that allocation; at one target.
        found: sparsity of each linear that such a stage is around; written by the stage before.
        dampening: share of the mean diagonal added to Hessians (sparsegpt, formulas with H).
        block_size: columns pruned at once (sparsegpt).
    """

    renamed: ClassVar[Mapping[str, str]] = {"calibration": "statistics", "damp": "dampening"}

    changeable: ClassVar[tuple[str, ...]] = (*SpaceSettings.changeable, "refine", "found")

    later: ClassVar[tuple[str, ...]] = ("step_weights", "around")

    kind: Literal["allocation"] = "allocation"
    metric: MetricName = "wanda"
    granularity: Granularity = "linear"
    target: Target = 0.6
    step: float = Field(default=0.05, gt=0, le=1)
    max_sparsity: float = Field(default=0.95, gt=0, le=1)
    group_size: int | None = Field(default=None, ge=2)
    step_weights: int | None = Field(default=None, ge=1)
    around: int | None = Field(default=None, ge=1)
    protect: list[str] = Field(default=[])
    comparison: Comparison | None = None
    statistics: Literal["dense", "sequential", "expected"] = "sequential"
    refine: int = Field(default=0, ge=0, le=3)
    found: dict[str, float] | None = None
    dampening: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    block_size: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _check(self) -> AllocationSettings:
        if len(self.levels) < 2:
            raise ValueError(
                f"Expected a level above 0, got none up to `max_sparsity` {self.max_sparsity}. "
                f"Raise `max_sparsity`, or use a smaller `step`."
            )
        if self.step_weights is not None and (self.granularity != "linear" or self.group_size is not None):
            raise ValueError(
                f"Expected `granularity: linear` and no `group_size` beside `step_weights`, got {self.granularity} and "
                f"{self.group_size}. Leave them out, or use `step`."
            )
        if self.around is not None and self.step_weights is None:
            raise ValueError(f"Expected `step_weights` beside `around`, got `around: {self.around}` alone.")
        if self.refine and (self.group_size is not None or len(self.targets) > 1):
            got = (
                f"{len(self.targets)} targets"
                if self.group_size is None
                else f"`group_size` {self.group_size}"
            )
            raise ValueError(f"Expected one `target` and no `group_size` with `refine`, got {got}.")
        return self

    @property
    def by_gradients(self) -> bool:
        return True

    @property
    def method_names(self) -> tuple[str, ...]:
        return (self.metric,)

    @property
    def export_statistics(self) -> str:
        return self.statistics

    @property
    def expected_share(self) -> float | None:
        """Target of the uniform allocation behind which statistics of levels are collected; None: dense blocks."""
        return self.targets[(len(self.targets) - 1) // 2] if self.statistics == "expected" else None

    @property
    def fixed(self) -> Mapping[str, Any]:
        if self.found is not None:
            return {"found": hashlib.sha256(json.dumps(self.found, sort_keys=True).encode()).hexdigest()}
        share = {} if self.expected_share is None else {"expected_share": self.expected_share}
        return share if self.step_weights is None else share | {"levels_from": list(self.targets)}

    @property
    def stages_left(self) -> int:
        return self.refine

    def refined(self, found: Mapping[str, float]) -> AllocationSettings:
        finer = {"step": self.step / 2, "step_weights": self.step_weights and max(1, self.step_weights // 2)}
        changes = {"statistics": "expected", "refine": self.refine - 1, "around": None, "found": dict(found)}
        return self.model_validate({**self.model_dump(), **finer, **changes})

    @property
    def targets(self) -> tuple[float, ...]:
        return targets_of(self.target)

    @property
    def levels(self) -> tuple[float, ...]:
        """Sparsity of each level: multiples of the step, or of one zero in each group."""
        step = Fraction(1, self.group_size) if self.group_size else Fraction(str(self.step))
        n_steps = math.floor(Fraction(str(self.max_sparsity)) / step)
        return tuple(float(i * step) for i in range(n_steps + 1))


def build_allocation(
    settings: AllocationSettings, linears: Sequence[Prunable], shape: ModelShape
) -> AllocationSpace:
    """The space of these settings, for a model with these linears.

    Raises:
        ValueError: if a pattern in `protect` matches nothing or too much, or a target can't be met.
    """
    free, protected = split_protected(linears, settings.protect)
    units = group(free, settings.granularity)
    return AllocationSpace(
        units, protected, _levels(settings, linears), settings.targets, shape, settings.found
    )


def _levels(settings: AllocationSettings, linears: Sequence[Prunable]) -> Sparsities:
    """Sparsities of the levels: of all linears, by their numbers of weights, or around what was found for each."""
    step = settings.step_weights
    if settings.found is not None:
        return {
            x.name: levels_around(_found(settings, x), _step(settings, x), settings.max_sparsity)
            for x in linears
        }
    if step is None:
        return settings.levels
    above = (settings.targets, settings.max_sparsity, settings.around)
    return {n: levels_by_weights(n, step, *above) for n in sorted({x.n_weights for x in linears})}


def _found(settings: AllocationSettings, linear: Prunable) -> float:
    """Found sparsity of a linear.

    Raises:
        ValueError: if there is none.
    """
    found = (settings.found or {}).get(linear.name)
    if found is None or not 0 <= found <= 1:
        raise ValueError(f"Expected a sparsity of each linear in `found`, got {found} at {linear.name}.")
    return found


def _step(settings: AllocationSettings, linear: Prunable) -> Fraction:
    """Distance of a linear's levels."""
    of = settings.step_weights
    return Fraction(str(settings.step)) if of is None else Fraction(of, linear.n_weights)
