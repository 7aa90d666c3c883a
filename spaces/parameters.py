"""How a space names what can be chosen, for optimisers that think in parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IntParameter:
    """An ordered choice: neighbouring values mean similar candidates.

    Args:
        name: unique in its space.
        low: the smallest value.
        high: the largest value, >= low.
        step: between values; the distance from `low` to `high` is a multiple of it.

    Raises:
        ValueError: if `step` does not lead from `low` to `high`.
    """

    name: str
    low: int
    high: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.step < 1 or self.high < self.low or (self.high - self.low) % self.step:
            raise ValueError(
                f"Expected `high` to be some steps of `step` (>= 1) above `low`, got {self.low} to {self.high} "
                f"by {self.step} at {self.name}."
            )
