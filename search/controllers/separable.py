"""Additive loss model of a separable space: interpolated losses of single slots, and the exact minimum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from secateur.search.controllers.knapsack import Array, Knapsack
from secateur.spaces.space import SeparableSpace, Space


def removed_energy(share: Array) -> Array:
    """Share of the squared norm of Gaussian weights in the smallest `share` of them.

    With the threshold q, P(abs(w) < q) = share, it is E[w²; abs(w) < q] = share − 2 q φ(q). The output error of a
    pruned layer grows about in proportion, so losses are nearly linear in it: a better abscissa than the share itself
    for interpolation between few measurements.
    """
    from scipy.stats import norm  # scipy takes half a second to import, longer than reading a run

    share = np.asarray(share, dtype=float)
    q = norm.ppf((1 + np.minimum(share, 1 - 1e-12)) / 2)
    return np.where(share >= 1, 1.0, share - 2 * q * norm.pdf(q))


def complete(shares: Array, measured: dict[int, float], anchor: int) -> Array:
    """Differences of loss at all options, interpolated from some of them.

    Measured differences are made monotone, since deviations are noise: at least 0 above the anchor, at most 0 below
    it, and non-decreasing by isotonic regression. Between measurements: monotone cubic interpolation (PCHIP) over
    `removed_energy`; outside: the straight line through the nearest two.

    Args:
        shares: of the options, ascending, in [0, 1].
        measured: option -> loss minus the anchor's loss.
        anchor: option of the reference, with difference 0.

    Returns:
        One difference for each of the shares.
    """
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import isotonic_regression

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
    """The candidate, and its variants in slots that do not count towards the target, such as the repair.

    These slots can't be measured alone: in the dense model they have no effect.
    """
    rows = []
    for slot, own in enumerate(space.disassemble(candidate)):
        options = space.options(slot)
        free = not any(space.usage(slot, option) for option in options)
        rows.append([own, *(option for option in options if free and option != own)])
    return [space.assemble(row) for row in product(*rows)]


class TargetSolver:
    """Exact solution of one target of a space, for any losses of its slots."""

    def __init__(self, space: SeparableSpace[Any], target: int) -> None:
        self._space, self._target = space, target
        self._options = [list(space.options(slot)) for slot in range(len(space.slots))]
        usages = [[space.usage(slot, option) for option in row] for slot, row in enumerate(self._options)]
        self._knapsack = Knapsack(usages, *space.usage_bounds(target))

    def solve(self, losses: Sequence[Array]) -> Any | None:
        """Candidate with the smallest sum of losses; None if no allowed options meet the target.

        Losses are by slot and option; infinite for forbidden options.
        """
        choice = self._knapsack.solve(losses)
        if choice is None:
            return None
        candidate = self._space.assemble([row[i] for row, i in zip(self._options, choice, strict=True)])
        return self._space.repair(
            candidate, self._target, np.random.default_rng(0)
        )  # of the MILP's tolerance


def solve(space: SeparableSpace[Any], losses: Sequence[Array], target: int) -> Any | None:
    """Candidate of a target with the smallest sum of losses, see `TargetSolver`."""
    return TargetSolver(space, target).solve(losses)


def check_separable(space: Space[Any], what: str) -> SeparableSpace[Any]:
    """The space, checked to be separable.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(space, SeparableSpace):
        raise ValueError(
            f"Expected a space whose slots can be measured alone for `{what}`, got {type(space).__name__}. Use "
            f"another controller, or `start: random`."
        )
    return space
