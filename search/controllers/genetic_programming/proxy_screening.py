"""Screening of formulas by a proxy, weighted by its measured rank correlation with the loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from secateur.search.controllers.genetic_programming.population import Individual
from secateur.search.controllers.genetic_programming.settings import GeneticSettings

RECENT = 64
"""Latest (proxy, loss) pairs in the correlation: later formulas are better ones."""

ENOUGH = 10
"""Least number of formulas for a correlation; with fewer the proxy is trusted."""


class Screening:
    """Selection of formulas by a proxy, weaker as its rank correlation with the loss falls.

    The correlation is of the better half by loss: nearly any proxy recognises bad formulas, which become rare during a
    search, and may still rank good ones by properties unrelated to the loss.
    """

    def __init__(self, settings: GeneticSettings) -> None:
        self._settings = settings
        self._pairs: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def note(self, proxy: float, loss: float) -> None:
        """Record a formula's values by the proxy and at the smallest fidelity."""
        self._pairs.append((proxy, loss))

    @property
    def correlation(self) -> float | None:
        """Spearman correlation of proxy and loss in the better half; None for too few formulas."""
        better = sorted(self._pairs, key=lambda pair: pair[1])[: math.ceil(len(self._pairs) / 2)]
        if len(better) < ENOUGH:
            return None
        proxies, losses = zip(*better, strict=True)
        return spearman(proxies, losses) or 0.0

    @property
    def oversampling(self) -> float:
        """New formulas for each one measured on data: the setting to the power of correlation / trust."""
        found, settings = self.correlation, self._settings
        trusted = 1.0 if found is None else min(1.0, max(0.0, found / settings.trust))
        return float(settings.oversampling**trusted)

    def choose(self, ranked: Sequence[Individual], n: int, rng: np.random.Generator) -> list[Individual]:
        """At most `n` of the individuals: the first ones, and some random others."""
        if n >= len(ranked):
            return list(ranked)
        share = self._settings.chance * n
        n_random = math.floor(share) + int(rng.random() < share % 1)
        first, others = ranked[: n - n_random], ranked[n - n_random :]
        drawn = sorted(rng.choice(len(others), size=n_random, replace=False).tolist())
        return [*first, *(others[i] for i in drawn)]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation in [-1, 1], equal values sharing their mean rank; None for constant values."""
    from scipy.stats import rankdata  # takes half a second to import

    a, b = rankdata(first), rankdata(second)
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return None
    return float(np.corrcoef(a, b)[0, 1])
