"""Cache of statistics on disk, bounded in size, shared by the processes of a node."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from secateur.pruners.stores.block_files import (
    LevelStoreError,
    block_path,
    check_room,
    load_block,
    save_block,
)

_N_LOCKS = 64
"""Lock files, each for many keys: one for each key could never be deleted."""

_LOCK, _FRESH, _GONE = ".lock-", ".fresh-", ".gone-"


class StatisticsCache:
    """Entries of named tensors in files, one a piece; those used longest ago are evicted.

    An entry is whole or missing, whenever its writer is killed. Tensors are mapped: the processes of a node share one
    copy, which stays usable after its entry was evicted. The limit holds after each `put`, but for what other
    processes write at that moment. An entry's key is ``GROUP.PART``; locks are of groups.

    Args:
        directory: made when it is needed.
        limit_bytes: of all entries together; the one used last is kept whatever its size.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes

    def locked(self, group: str) -> FileLock:
        """Lock of a group's entries; look for an entry again once it is held. It ends with its process."""
        self.directory.mkdir(parents=True, exist_ok=True)
        number = int(hashlib.sha256(group.encode()).hexdigest(), 16) % _N_LOCKS
        return FileLock(self.directory / f"{_LOCK}{number:02d}", fallback_to_soft=False)

    def get(self, key: str) -> list[dict[str, Tensor]] | None:
        """The pieces of an entry, mapped, now the one used last; None if it is missing."""
        place = self.directory / key
        try:
            os.utime(place)
            return _load(place)
        except (FileNotFoundError, LevelStoreError):  # not there; or deleted meanwhile, or spoilt
            return None

    def make_room(self, n_bytes: int, what: str) -> None:
        """Evict entries for so many bytes of a new one, before it is computed.

        Raises:
            LevelStoreError: if it is more than the limit, or than the disk can take.
        """
        if n_bytes > self.limit_bytes:
            raise LevelStoreError(
                f"Expected a cache of statistics of at least {n_bytes / 1e6:,.1f} MB for {what}, got a limit of "
                f"{self.limit_bytes / 1e6:,.1f} MB. Raise `space.cache_gb`, or take a method that needs less."
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._shrink(self.limit_bytes - n_bytes)
        check_room(self.directory, n_bytes, "lower the limit of the cache", what)

    @property
    def has_entries(self) -> bool:
        """True if there is any entry."""
        return self.directory.is_dir() and any(x.name[0] != "." for x in self.directory.iterdir())

    def fresh_place(self, key: str) -> Path:
        """Directory of an entry that is not whole."""
        return self.directory / f"{_FRESH}{key}"

    def fresh(self, key: str) -> tuple[Path, int]:
        """Directory of an entry that is not whole, and the number of pieces that a killed writer left, while locked."""
        fresh, count = self.fresh_place(key), 0
        with suppress(LevelStoreError):
            while load_block(fresh, count):
                count += 1
        return fresh, count

    def put(
        self, key: str, pieces: Iterable[Mapping[str, Tensor]], n_there: int = 0
    ) -> list[dict[str, Tensor]]:
        """Write an entry piece by piece, over an older one, while its group is locked; the pieces, mapped.

        Args:
            key: of the entry.
            pieces: all, or those after the ones that are there.
            n_there: number of pieces that a killed writer left, see `fresh`, and that are to be a part of the entry.

        Raises:
            LevelStoreError: if it can't be written; then nothing is left of it.
        """
        fresh = self.fresh_place(key)
        if not n_there:
            shutil.rmtree(fresh, ignore_errors=True)  # of a writer that was killed
        fresh.mkdir(exist_ok=True)
        try:
            for index, tensors in enumerate(pieces, n_there):
                save_block(tensors, fresh, index)
            _keep_pieces(fresh)
            written = _load(fresh)
            self._delete(self.directory / key)
            fresh.rename(self.directory / key)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        self._shrink(self.limit_bytes)
        return written

    def _shrink(self, limit_bytes: int) -> None:
        """Delete the rests of killed processes, and entries until the others have at most so many bytes."""
        entries = []
        for place in self.directory.iterdir():
            if place.name.startswith(_GONE):
                shutil.rmtree(place, ignore_errors=True)
            elif place.name.startswith(_FRESH):
                self._sweep(place)
            elif not place.name.startswith(_LOCK):
                with suppress(FileNotFoundError):  # another process was quicker
                    n_bytes = sum(file.stat().st_size for file in place.iterdir())
                    entries.append((place.stat().st_mtime_ns, n_bytes, place))
        entries.sort()
        total = sum(n_bytes for _, n_bytes, _ in entries)
        for _, n_bytes, place in entries[:-1]:
            if total <= limit_bytes:
                break
            self._delete(place)
            total -= n_bytes

    def _delete(self, place: Path) -> None:
        """Rename the entry in one step, so that nobody sees half of it, then delete it."""
        gone = Path(tempfile.mkdtemp(prefix=_GONE, dir=self.directory))
        with suppress(FileNotFoundError):
            place.rename(gone / place.name)
        shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self, fresh: Path) -> None:
        """Delete a half-written entry, unless its writer lives."""
        group = fresh.name.removeprefix(_FRESH).partition(".")[0]
        with suppress(Timeout), self.locked(group).acquire(blocking=False):
            shutil.rmtree(fresh, ignore_errors=True)


def _keep_pieces(entry: Path) -> None:
    """Delete what workers left beside the pieces that they built."""
    pieces = {block_path(entry, index) for index in range(len(list(entry.iterdir())))}
    for other in set(entry.iterdir()) - pieces:
        shutil.rmtree(other) if other.is_dir() else other.unlink()


def _load(entry: Path) -> list[dict[str, Tensor]]:
    return [load_block(entry, index) for index in range(len(list(entry.iterdir())))]
