"""State of a long computation, kept on the disk so that a killed process is continued."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.stores.block_files import load_tensors, save_tensors


class SavedState(ABC):
    """Named tensors, whole or missing."""

    @abstractmethod
    def load(self) -> dict[str, Tensor]:
        """The tensors written last, mapped; none if there are none."""

    @abstractmethod
    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors over those before.

        Raises:
            LevelStoreError: if they can't be written.
        """

    @abstractmethod
    def clear(self) -> None:
        """Delete the tensors."""


class CachedState(SavedState):
    """State under one key of the cache of statistics.

    Args:
        cache: of statistics.
        group: of the entry; its identity is everything that the tensors depend on beside `name`.
        name: of the computation, with its settings.
        held: whether the caller holds the group's lock.
    """

    def __init__(self, cache: StatisticsCache, group: str, name: str, *, held: bool = False) -> None:
        self._cache = cache
        self._group = group
        self._key = f"{group}.{name}"
        self._held = held

    def load(self) -> dict[str, Tensor]:
        pieces = self._cache.get(self._key)
        return pieces[0] if pieces else {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        with nullcontext() if self._held else self._cache.locked(self._group):
            self._cache.put(self._key, [tensors])

    def clear(self) -> None:
        if self.load():
            self.save({})


class FileState(SavedState):
    """State in a file of its own.

    Args:
        path: of the file.
        identity: all that the tensors depend on, in one text.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity

    def load(self) -> dict[str, Tensor]:
        return load_tensors(self._path, self._identity) or {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        save_tensors(self._path, tensors, self._identity)

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)
