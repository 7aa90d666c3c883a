"""State of a long computation, kept in the cache of statistics so that a killed process is continued."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from secateur.pruners.calibration.cache import StatisticsCache


class SavedState:
    """Named tensors under one key of the cache, whole or missing.

    Args:
        cache: of statistics.
        group: of the entry; its identity is everything that the tensors depend on beside `name`.
        name: of the computation, with its settings.
    """

    def __init__(self, cache: StatisticsCache, group: str, name: str) -> None:
        self._cache = cache
        self._group = group
        self._key = f"{group}.{name}"

    def load(self) -> dict[str, Tensor]:
        """The tensors written last, mapped; none if there are none."""
        pieces = self._cache.get(self._key)
        return pieces[0] if pieces else {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors over those before.

        Raises:
            LevelStoreError: if they can't be written.
        """
        with self._cache.locked(self._group):
            self._cache.put(self._key, [tensors])
