"""Directories that workers read: found in place, or copied once to each node."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from secateur.search.executors.cluster.lazy_ray import load_ray

CHUNK_BYTES = 64 << 20
SMALL_BYTES = 1 << 20
"""Files up to this size are compared by content, larger ones by size."""

_DONE = ".whole"


class StagingError(RuntimeError):
    """A node can't be given its copy of a directory."""


@dataclass(frozen=True)
class File:
    """One file of a folder: its path in it, its size in bytes, and the SHA-256 of a small one."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Folder:
    """A directory as it is on the driver's node.

    Args:
        path: there.
        files: all of them, sorted by name.
    """

    path: str
    files: tuple[File, ...]

    @property
    def digest(self) -> str:
        """Identifies the content, as far as `File` knows it."""
        return hashlib.sha256(repr(self.files).encode()).hexdigest()[:16]

    @property
    def n_bytes(self) -> int:
        return sum(file.size for file in self.files)


def describe(directory: Path) -> Folder:
    """The folder in a directory; what is hidden, or in a hidden directory, is no part of it."""
    found = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    seen = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    files = [_file(directory / path, path.as_posix()) for path in seen]
    return Folder(str(directory.resolve()), tuple(files))


def _file(path: Path, name: str) -> File:
    size = path.stat().st_size
    return File(name, size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= SMALL_BYTES else "")


class Depot:
    """Made a Ray actor on the driver's node: reads folders for nodes that don't see them."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self._known = {folder.path: {file.name for file in folder.files} for folder in folders}

    def read(self, folder: str, name: str, offset: int) -> bytes:
        """Up to `CHUNK_BYTES` of a file."""
        with self._path(folder, name).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)

    def digest(self, folder: str, name: str) -> str:
        """SHA-256 of a file."""
        return _sha256(self._path(folder, name))

    def _path(self, folder: str, name: str) -> Path:
        if name not in self._known.get(folder, ()):  # nothing else of the driver's disk is handed out
            raise StagingError(f"Expected a file of the run, got {name} in {folder}.")
        return Path(folder) / name


@cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_copy(folder: Folder, depot: Any) -> str:
    """Where a folder lies on this node: where the driver has it, if that is the same here, else in the cache.

    The first process of a node that asks makes the copy, the others wait for it.

    Args:
        folder: to be found.
        depot: the actor to copy from, or None.

    Raises:
        StagingError: if it is neither here nor to be had.
    """
    if _in_place(folder):
        return folder.path
    if depot is None:
        raise StagingError(f"Expected {folder.path} as the driver sees it, got something else.")
    root = _cache() / "staged"
    target = root / folder.digest
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.digest}.lock", fallback_to_soft=False):
        if not (target / _DONE).exists():
            _copy(folder, target, depot)
    return str(target)


def _cache() -> Path:
    """The user's cache, by the same rule as everywhere."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SECATEUR_CACHE") or base / "secateur")


def _in_place(folder: Folder) -> bool:
    root = Path(folder.path)
    return all((root / f.name).is_file() and _file(root / f.name, f.name) == f for f in folder.files)


def _copy(folder: Folder, target: Path, depot: Any) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < folder.n_bytes:
        raise StagingError(
            f"Expected {folder.n_bytes / 1e6:,.0f} MB of room in {target.parent}, got {free / 1e6:,.0f} MB. Free some, "
            f"or set SECATEUR_CACHE on this node to a larger disk."
        )
    for file in folder.files:
        path = target / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("wb") as out:
            for chunk in _chunks(folder, file, depot):
                digest.update(chunk)
                out.write(chunk)
        expected = _get(depot.digest.remote(folder.path, file.name))
        if digest.hexdigest() != expected:
            raise StagingError(f"Expected {path} with SHA-256 {expected}, got {digest.hexdigest()}.")
    (target / _DONE).touch()


def _chunks(folder: Folder, file: File, depot: Any) -> Iterator[bytes]:
    for offset in range(0, file.size, CHUNK_BYTES):
        yield _get(depot.read.remote(folder.path, file.name, offset))


def _get(reference: Any) -> Any:
    ray = load_ray()

    return ray.get(reference)
