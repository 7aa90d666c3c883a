"""Successive halving: candidates measured at rising fidelities, the best of each promoted to the next.

Jamieson and Talwalkar (https://arxiv.org/abs/1502.07943), with any numbers of survivors.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from secateur.search.controller import Proposal
from secateur.search.controllers.procedure import Losses
from secateur.spaces.measurement import Fidelity

Ranked = list[tuple[float, Any]]
"""(loss, candidate), best first."""


def successive_halving(
    candidates: Sequence[Any], fidelities: Sequence[Fidelity], survivors: Sequence[int]
) -> Generator[list[Proposal], Losses, Ranked]:
    """Measure candidates at each fidelity in turn.

    Args:
        candidates: all measured at the first fidelity.
        fidelities: ascending.
        survivors: numbers of candidates promoted to the second fidelity, the third, ...

    Returns:
        Those measured at the last fidelity; none if all candidates are infeasible before.
    """
    found: Ranked = []
    for fidelity, n_next in zip(fidelities, (*survivors, 0), strict=True):
        losses = yield [Proposal(candidate, fidelity) for candidate in candidates]
        found = ranked(zip(losses, candidates, strict=True))
        candidates = [candidate for loss, candidate in found[:n_next] if math.isfinite(loss)]
        if n_next and not candidates:
            return []
    return found


def ranked(pairs: Iterable[tuple[float, Any]]) -> Ranked:
    """The pairs by loss; ties keep their order."""
    return sorted(pairs, key=lambda pair: pair[0])


def n_survivors(n: int, given: Sequence[int] | None, n_fidelities: int) -> tuple[int, ...]:
    """Numbers of survivors after each fidelity but the last.

    Args:
        n: candidates at the first fidelity.
        given: the numbers; None: a quarter of the previous number each time, at least one.
        n_fidelities: of the search.

    Raises:
        ValueError: if other than one number for each fidelity after the first is given.
    """
    if given is None:
        return tuple(max(1, n // 4**stage) for stage in range(1, n_fidelities))
    if len(given) != n_fidelities - 1:
        raise ValueError(
            f"Expected one number in `survivors` for each fidelity after the first ({n_fidelities - 1}), "
            f"got {list(given)}."
        )
    return tuple(given)
