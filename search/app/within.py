"""Least share to prune with which a model keeps within bounds on the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.search.errors import UsageError
from secateur.search.results.pick import Bound
from secateur.spaces.latency import measuring_command

STEP = 0.005
"""Distance of the shares that are tried."""

NEAR = 20
"""Number of shares tried from one on, where the model has no shape at some."""

Costs = Mapping[str, float]


def least_share(
    bounds: Sequence[Bound], dense: Costs, attempt: Callable[[float], tuple[Any, Costs]]
) -> tuple[float, Any, Costs]:
    """Least share, of multiples of `STEP`, at which all bounds are met, by bisection.

    Args:
        bounds: upper limits.
        dense: costs of the dense model.
        attempt: configuration at a share, and its costs, which fall as the share rises; a ValueError where the model
            has no shape for it.

    Returns:
        The share, its configuration and its costs.

    Raises:
        UsageError: if no share meets them, or a cost is not known.
    """
    limits = {bound.value: _limit(bound, dense) for bound in bounds}
    n_steps = round(1 / STEP)
    found, low, high, refused = None, 0, n_steps - 1, ""
    while low < high:
        middle = (low + high) // 2
        for step in range(middle, min(middle + NEAR, n_steps)):
            try:
                config, costs = attempt(step * STEP) if step else attempt(STEP / 10)
                break
            except ValueError as error:
                refused = str(error)
        else:
            high = middle
            continue
        if all(costs[name] <= limit for name, limit in limits.items()):
            found, high = (step * STEP, config, costs), middle
        else:
            low = step + 1
    if found is None:
        asked = ", ".join(f"--{bound.name} {bound.text}" for bound in bounds)
        raise UsageError(
            f"Expected bounds that pruned blocks can meet, got {asked}. Loosen them. {refused}".rstrip()
        )
    return found


def _limit(bound: Bound, dense: Costs) -> float:
    """Limit in the value's unit."""
    value = bound.value
    if value not in dense:
        raise UsageError(
            f"Expected a latency table of this model on this machine for `--{bound.name}`, got none. Measure one: "
            f"{measuring_command(value)}."
        )
    return bound.limit * dense[value] if bound.relative else bound.limit
