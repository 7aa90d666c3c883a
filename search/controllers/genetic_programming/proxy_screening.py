"""Screening by a proxy: how many formulas it may choose from, which go on, and how far it can be trusted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from secateur.search.controllers.genetic_programming.population import Individual
from secateur.search.controllers.genetic_programming.settings import GeneticSettings
from secateur.search.results.correlation import spearman

RECENT = 64
"""Pairs of (proxy, loss) that count: as a search goes on it compares ever better formulas."""

ENOUGH = 10
"""Formulas from which on a correlation says something; until then the proxy is trusted."""


class Screening:
    """Watches a proxy by its rank correlation with the loss, and lets more formulas pass as it falls.

    Only the half of the formulas with the lower losses counts: nearly any proxy tells the hopeless ones, which a
    population meets less and less, and may yet order the good ones by something that has no part in the loss.

    Args:
        settings: how far to go.
    """

    def __init__(self, settings: GeneticSettings) -> None:
        self._settings = settings
        self._pairs: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def note(self, proxy: float, loss: float) -> None:
        """A formula was measured by the proxy and on data, at the smallest fidelity."""
        self._pairs.append((proxy, loss))

    @property
    def correlation(self) -> float | None:
        """Spearman's, of proxy and loss in the better half; None as long as too little is known."""
        better = sorted(self._pairs, key=lambda pair: pair[1])[: math.ceil(len(self._pairs) / 2)]
        if len(better) < ENOUGH:
            return None
        proxies, losses = zip(*better, strict=True)
        return spearman(proxies, losses) or 0.0

    @property
    def oversampling(self) -> float:
        """New formulas for each that is measured on data: the setting to the power of correlation over trust."""
        found, settings = self.correlation, self._settings
        trusted = 1.0 if found is None else min(1.0, max(0.0, found / settings.trust))
        return float(settings.oversampling**trusted)

    def choose(self, ranked: Sequence[Individual], n: int, rng: np.random.Generator) -> list[Individual]:
        """`n` of the individuals, as far as there are so many: the first ones, and some of the others by chance."""
        if n >= len(ranked):
            return list(ranked)
        share = self._settings.chance * n
        n_random = math.floor(share) + int(rng.random() < share % 1)
        first, others = ranked[: n - n_random], ranked[n - n_random :]
        drawn = sorted(rng.choice(len(others), size=n_random, replace=False).tolist())
        return [*first, *(others[i] for i in drawn)]
