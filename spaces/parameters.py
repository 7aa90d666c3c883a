"""How a space names what can be chosen, for optimisers that think in parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Requirement:
    """That another parameter, where it applies, has one of these values."""

    parameter: str
    values: frozenset[int]


@dataclass(frozen=True)
class IntParameter:
    """A choice out of whole numbers.

    Args:
        name: unique in its space.
        low: the smallest value.
        high: the largest value, >= low.
        step: between values; the distance from `low` to `high` is a multiple of it.
        categorical: values are names without an order; else neighbouring values mean similar candidates.
        when: it applies if all of these are met; each names a parameter before it.

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
        """Whether it does, next to these values of those before it that apply."""
        return all(r.parameter not in values or values[r.parameter] in r.values for r in self.when)
