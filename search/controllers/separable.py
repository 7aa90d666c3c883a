"""The additive model: each slot's loss alone, completed between measurements, and its exact minimum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression
from scipy.stats import norm

from secateur.search.controllers.knapsack import Array, solve_knapsack
from secateur.spaces.space import SeparableSpace


def removed_energy(share: Array) -> Array:
    """Share of the squared norm of Gaussian weights that goes with the smallest `share` of them.

    With q the threshold, P(abs(w) < q) = share, it is E[w²; abs(w) < q] = share − 2 q φ(q). The error
    that pruning makes in a layer's output grows about like this, so losses are nearly straight lines over
    it: a better ruler than the share itself to complete few measurements on.
    """
    share = np.asarray(share, dtype=float)
    q = norm.ppf((1 + np.minimum(share, 1 - 1e-12)) / 2)
    return np.where(share >= 1, 1.0, share - 2 * q * norm.pdf(q))


def complete(shares: Array, measured: dict[int, float], anchor: int) -> Array:
    """Differences of loss at all options from those at some of them.

    The differences are made monotone (not below 0 beyond the anchor, not above 0 before it, and
    non-decreasing by isotonic regression), as noise is the only reason for them not to be. Between
    measurements: monotone cubic interpolation (PCHIP) over `removed_energy`; outside: the straight line of
        the nearest two.

    Args:
        shares: of the options, ascending, in [0, 1].
        measured: option -> loss minus the anchor's loss.
        anchor: the option whose difference is 0 by definition.

    Returns:
        One difference for each of the shares.
    """
    options = sorted({*measured, anchor})
    if len(options) == 1:
        return np.zeros(len(shares))
    differences = [
        0.0 if o == anchor else max(measured[o], 0.0) if o > anchor else min(measured[o], 0.0)
        for o in options
    ]
    y = isotonic_regression(differences).x
    x = removed_energy(shares)
    known, keep = np.unique(x[options], return_index=True)
    y = y[keep]
    if len(known) == 1:
        return np.zeros(len(shares))
    inside = PchipInterpolator(known, y)(np.clip(x, known[0], known[-1]))
    below = (y[1] - y[0]) / (known[1] - known[0]) * np.minimum(x - known[0], 0)
    above = (y[-1] - y[-2]) / (known[-1] - known[-2]) * np.maximum(x - known[-1], 0)
    completed: Array = inside + below + above
    return completed


def with_free_slots(space: SeparableSpace[Any], candidate: Any) -> list[Any]:
    """The candidate, then with each other option in the slots that use up none of the target, such as a repair.

    Nothing is known of those before a candidate is pruned: alone, in the dense model, they change nothing.
    """
    rows = []
    for slot, own in enumerate(space.disassemble(candidate)):
        options = space.options(slot)
        free = not any(space.usage(slot, option) for option in options)
        rows.append([own, *(option for option in options if free and option != own)])
    return [space.assemble(row) for row in product(*rows)]


def solve(space: SeparableSpace[Any], losses: Sequence[Array], target: int) -> Any | None:
    """The candidate of a target with the smallest sum of losses.

    Args:
        space: separable.
        losses: for each slot the loss of each option; infinite for an option that must not be taken.
        target: index of the target.

    Returns:
        The candidate, or None if no allowed options meet the target.
    """
    options = [list(space.options(slot)) for slot in range(len(losses))]
    usages = [[space.usage(slot, option) for option in row] for slot, row in enumerate(options)]
    choice = solve_knapsack(losses, usages, *space.usage_bounds(target))
    if choice is None:
        return None
    candidate = space.assemble([row[index] for row, index in zip(options, choice, strict=True)])
    return space.repair(candidate, target, np.random.default_rng(0))  # of the MILP's tolerance
