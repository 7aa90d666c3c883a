"""Parameters of a space, for samplers such as Optuna's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Requirement:
    """Condition that another parameter, if it applies, has one of these values."""

    parameter: str
    values: frozenset[int]


@dataclass(frozen=True)
class IntParameter:
    """Integer parameter.

    Args:
        name: unique in its space.
        low: the smallest value.
        high: the largest value, >= low.
        step: between values; divides `high` - `low`.
        categorical: values have no order; else neighbouring values mean similar candidates.
        when: conditions, all of which must hold for the parameter to apply; each names an earlier parameter.

    Raises:
        ValueError: if `step` does not lead from `low` to `high`.
    """

    name: str
    low: int
    high: int
    step: int = 1
    categorical: bool = False
    when: tuple[Requirement, ...] = ()

    def __post_init__(self) -> None:
        if self.step < 1 or self.high < self.low or (self.high - self.low) % self.step:
            raise ValueError(
                f"Expected `high` to be some steps of `step` (>= 1) above `low`, got {self.low} to {self.high} "
                f"by {self.step} at {self.name}."
            )

    def applies(self, values: Mapping[str, int]) -> bool:
        """Whether the parameter applies, given the values of the earlier ones that apply."""
        return all(r.parameter not in values or values[r.parameter] in r.values for r in self.when)
