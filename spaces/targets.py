"""The settings key ``target``: one value, a list, or a range."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from secateur.spaces.section import Section


class Range(Section):
    """Targets ``low``, ``low + step``, ... up to ``high``, both ends included."""

    low: float
    high: float
    step: float = Field(default=0.05, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"Expected `target` with 0 <= `low` <= `high` <= 1, got low {self.low} and high {self.high}."
            )
        return self

    @property
    def values(self) -> tuple[float, ...]:
        low, high, step = (Fraction(str(x)) for x in (self.low, self.high, self.step))
        return tuple(float(low + i * step) for i in range(math.floor((high - low) / step) + 1))


def _checked(target: float | list[float] | Range) -> float | list[float] | Range:
    values = target if isinstance(target, list) else targets_of(target)
    if not values:
        raise ValueError("Expected `target` to hold at least one sparsity, got an empty list.")
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"Expected `target` within [0, 1], got {value}. It is the fraction to remove.")
    return target


Target = Annotated[float | list[float] | Range, AfterValidator(_checked)]


def targets_of(target: Target) -> tuple[float, ...]:
    """The targets in ascending order."""
    if isinstance(target, Range):
        return target.values
    return tuple(sorted(set(target))) if isinstance(target, list) else (target,)
