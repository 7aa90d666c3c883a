"""Parameters of a space in Optuna's terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.spaces.parameters import IntParameter

if TYPE_CHECKING:  # takes a second to import
    from optuna.distributions import BaseDistribution


def distribution_of(parameter: IntParameter) -> BaseDistribution:
    """What Optuna draws from; a categorical one's choices are the numbers."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    low, high, step = parameter.low, parameter.high, parameter.step
    if parameter.categorical:
        return CategoricalDistribution(range(low, high + 1, step))
    return IntDistribution(low, high, step=step)
