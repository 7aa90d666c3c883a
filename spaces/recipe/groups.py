"""Patterns of recipes of weights, `n_keep` of every `group_size`: checks."""

from __future__ import annotations

from secateur.spaces.levels import n_zeros
from secateur.spaces.methods import METRICS, UPDATES
from secateur.spaces.recipe.keys import Flat


def check_groups(sparsity: float, flat: Flat) -> None:
    """Check a pattern against sparsity, metric and rule.

    Args:
        sparsity: of the recipe.
        flat: applicable values by ``section.key``; of a pattern only one that is given.

    Raises:
        ValueError: if a group has no whole number of zeros, the metric can't choose within groups, or the rule gives
            layers different shares.
    """
    size = flat.get("metric.group_size", 0)
    if not size:
        return
    name, zeros = flat["metric.name"], n_zeros(sparsity, size)
    if abs(zeros - sparsity * size) > 1e-9 or not 0 < zeros < size:
        near = min(max(zeros, 1), size - 1) / size
        raise ValueError(
            f"Expected `sparsity` to be a whole number of zeros in each {size} weights, as `metric.group_size` says, "
            f"got {sparsity:g}. Take {near:g}, or another size."
        )
    made_for = None if name in UPDATES or name not in METRICS else METRICS[name].group
    if made_for not in (None, size) or (name in UPDATES and not UPDATES[name].patterns):
        other = f"of {made_for}" if made_for else "0"
        raise ValueError(
            f"Expected `metric.group_size` {other} with the metric {name}, got {size}. Change it, or take "
            "another metric."
        )
    unlike = [path for path in ("allocation.skip_first", "allocation.skip_last") if flat.get(path)]
    if flat["allocation.rule"] != "uniform" or unlike:
        raise ValueError(
            f"Expected the rule uniform for all blocks with `metric.group_size`, which gives all layers one share, got "
            f"{(unlike or [flat['allocation.rule']])[0]}. Say `allocation: uniform`."
        )
