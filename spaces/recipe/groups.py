"""Patterns of recipes of weights, `n_keep` of every `group_size`: checks of them, and of options for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from secateur.spaces.levels import n_zeros
from secateur.spaces.methods import METRICS, UPDATES
from secateur.spaces.recipe.keys import Flat

GROUP_SIZE = "metric.group_size"
EVEN = "uniform"
"""Rule that gives all layers one share, as patterns do, where it skips no blocks."""

SKIPS = ("allocation.skip_first", "allocation.skip_last")
"""Its parameters, which are 0 with a pattern."""


def check_groups(sparsity: float, flat: Flat) -> None:
    """Check a pattern against sparsity, metric and rule.

    Args:
        sparsity: of the recipe.
        flat: applicable values by ``section.key``; of a pattern only one that is given.

    Raises:
        ValueError: if a group has no whole number of zeros, the metric can't choose within groups, or the rule gives
            layers different shares.
    """
    size = flat.get(GROUP_SIZE, 0)
    if not size:
        return
    _check_share("sparsity", sparsity, size, GROUP_SIZE)
    name = flat["metric.name"]
    if not chooses_in_groups(name, size):
        made_for = None if name in UPDATES else METRICS[name].group
        other = f"of {made_for}" if made_for else "0"
        raise ValueError(
            f"Expected `metric.group_size` {other} with the metric {name}, got {size}. Change it, or take "
            "another metric."
        )
    unlike = [path for path in SKIPS if flat.get(path)]
    if flat["allocation.rule"] != EVEN or unlike:
        raise ValueError(
            f"Expected the rule {EVEN} for all blocks with `metric.group_size`, which gives all layers one share, got "
            f"{(unlike or [flat['allocation.rule']])[0]}. Say `allocation: {EVEN}`."
        )


def chooses_in_groups(metric: str, size: int) -> bool:
    """True if a metric of weights can choose within groups of this size."""
    if metric in UPDATES:
        return UPDATES[metric].patterns
    return metric not in METRICS or METRICS[metric].group in (None, size)


def goes_with_groups(flat: Flat, size: int) -> bool:
    """True if a recipe with these values by ``section.key`` can have groups of this size as it is."""
    even = flat["allocation.rule"] == EVEN and not any(flat.get(path) for path in SKIPS)
    return even and chooses_in_groups(flat["metric.name"], size)


def beside_groups(path: str, value: Any, before: Flat) -> Any:
    """The value, or another one of patterns and rules that contradict earlier items, see `check_groups`."""
    if path == GROUP_SIZE and value and not chooses_in_groups(before["metric.name"], value):
        return 0
    if not before.get(GROUP_SIZE):
        return value
    return EVEN if path == "allocation.rule" else 0 if path in SKIPS else value


def check_group_options(
    sizes: Iterable[int], targets: Iterable[float], metrics: Collection[str], rules: Collection[str]
) -> None:
    """Check options for the size of groups against the other choices of a search.

    Args:
        sizes: of the groups; 0: no pattern.
        targets: of the search.
        metrics: names of those that it may choose.
        rules: likewise.

    Raises:
        ValueError: if a group has no whole number of zeros at a target, or no metric or no rule goes with it.
    """
    for size in filter(None, sizes):
        for target in targets:
            _check_share("target", target, size, "group_size")
        if not any(chooses_in_groups(name, size) for name in metrics):
            raise ValueError(
                f"Expected `group_size` 0 with the metrics {', '.join(metrics)}, got {size}. Change it, or take "
                "another metric."
            )
        if EVEN not in rules:
            raise ValueError(
                f"Expected `allocations` with {EVEN} beside `group_size`, which gives all layers one share, got "
                f"{', '.join(rules)}."
            )


def _check_share(of: str, share: float, size: int, named: str) -> None:
    zeros = n_zeros(share, size)
    if abs(zeros - share * size) > 1e-9 or not 0 < zeros < size:
        near = min(max(zeros, 1), size - 1) / size
        raise ValueError(
            f"Expected `{of}` to be a whole number of zeros in each {size} weights, as `{named}` says, got {share:g}. "
            f"Take {near:g}, or another size."
        )
