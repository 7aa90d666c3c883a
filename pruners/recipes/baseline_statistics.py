"""Statistics of the dense model that the baselines' recipes take, which workers build before a search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from secateur.pruners.pruner import Config
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.stores.worker_store import WorkerStore


class BaselineStatistics:
    """Statistics on the windows that the baselines' recipes choose.

    Args:
        context: of the pools that windows are chosen from, and the cache that statistics go to.
        recipes: of the baselines, without the dense model.
        gram: whether they take Gram matrices.
    """

    def __init__(self, context: RecipeContext, recipes: Iterable[Config], *, gram: bool) -> None:
        self._gram = gram
        self._samples: dict[str, Sample] = {}
        for recipe in recipes:
            with suppress(ValueError):  # infeasible
                sample = context.sample(recipe["calibration"])
                self._samples[sample.sha256] = sample

    def stores(self) -> Sequence[WorkerStore]:
        """What is not yet in the cache, for workers to build."""
        places = [(x.statistics.unfinished(gram=self._gram), x) for x in self._samples.values()]
        return [
            WorkerStore(place, sample.tokens, "collecting statistics")
            for place, sample in places
            if place is not None
        ]

    def finish(self) -> None:
        """Put what workers have built into the cache, with blocks that they left out."""
        for sample in self._samples.values():
            place = sample.statistics.unfinished(gram=self._gram)
            if place is not None and place.is_dir():
                sample.statistics.prepare(inputs="gram" if self._gram else "moments")
