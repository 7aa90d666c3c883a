"""Screening of candidates by a proxy, weighted by its measured rank correlation with the loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from pydantic import Field

from secateur.search.controller import Proposal
from secateur.search.controllers.procedure import Losses
from secateur.search.controllers.successive_halving import ranked
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section

Each = TypeVar("Each")

RECENT = 64
"""Latest (proxy, loss) pairs in the correlation: later candidates are better ones."""

MAX_UNMEASURED = 50
"""Generations in a row without a measurement on data after which a search ends: measurements by the proxy use up no
budget."""

ENOUGH = 10
"""Least number of candidates for a correlation; with fewer the proxy is trusted."""


class ScreeningOptions(Protocol):
    """Options that a screening reads: of the settings of `genetic`, or of `ScreeningSettings`."""

    @property
    def oversampling(self) -> int: ...
    @property
    def chance(self) -> float: ...
    @property
    def trust(self) -> float: ...


class ScreeningSettings(Section):
    """Settings of the screening of candidates by the space's proxy for their loss.

    Args:
        oversampling: new candidates screened for each one that is measured, if the proxy is reliable.
        chance: share of the measured candidates drawn from those the proxy rejects, so that its rank correlation with
            the loss is not measured on its favourites alone.
        trust: rank correlation, in the better half, from which on `oversampling` is used in full; it falls to 1 at
            correlation 0.
    """

    oversampling: int = Field(default=8, ge=2)
    chance: float = Field(default=0.25, ge=0, le=1)
    trust: float = Field(default=0.7, gt=0, le=1)


class Screening:
    """Selection of candidates by a proxy, weaker as its rank correlation with the loss falls.

    The correlation is of the better half by loss: nearly any proxy recognises bad candidates, which become rare during
    a search, and may still rank good ones by properties unrelated to the loss.
    """

    def __init__(self, settings: ScreeningOptions) -> None:
        self._settings = settings
        self._pairs: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def note(self, proxy: float, loss: float) -> None:
        """Record a candidate's values by the proxy and at the smallest fidelity."""
        self._pairs.append((proxy, loss))

    @property
    def correlation(self) -> float | None:
        """Spearman correlation of proxy and loss in the better half; None for too few candidates."""
        better = sorted(self._pairs, key=lambda pair: pair[1])[: math.ceil(len(self._pairs) / 2)]
        if len(better) < ENOUGH:
            return None
        proxies, losses = zip(*better, strict=True)
        return spearman(proxies, losses) or 0.0

    @property
    def oversampling(self) -> float:
        """New candidates for each one measured on data: the setting to the power of correlation / trust."""
        found, settings = self.correlation, self._settings
        trusted = 1.0 if found is None else min(1.0, max(0.0, found / settings.trust))
        return float(settings.oversampling**trusted)

    def choose(self, ranked: Sequence[Each], n: int, rng: np.random.Generator) -> list[Each]:
        """At most `n` of the candidates: the first ones, and some random others."""
        if n >= len(ranked):
            return list(ranked)
        share = self._settings.chance * n
        n_random = math.floor(share) + int(rng.random() < share % 1)
        first, others = ranked[: n - n_random], ranked[n - n_random :]
        drawn = sorted(rng.choice(len(others), size=n_random, replace=False).tolist())
        return [*first, *(others[i] for i in drawn)]


def screened(
    candidates: Sequence[Any], n: int, proxy: Fidelity, screening: Screening, rng: np.random.Generator
) -> Generator[list[Proposal], Losses, dict[str, tuple[float, Any]]]:
    """The candidates that are worth a measurement, at most `n`: (value of the proxy, candidate) by their text."""
    found = yield [Proposal(candidate, proxy) for candidate in candidates]
    pairs = [pair for pair in ranked(zip(found, candidates, strict=True)) if math.isfinite(pair[0])]
    return {candidate.text: (value, candidate) for value, candidate in screening.choose(pairs, n, rng)}


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation in [-1, 1], equal values sharing their mean rank; None for constant values."""
    from scipy.stats import rankdata  # takes half a second to import

    a, b = rankdata(first), rankdata(second)
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return None
    return float(np.corrcoef(a, b)[0, 1])
