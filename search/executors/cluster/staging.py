"""Staging of directories for workers: used in place, or copied once to each node."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from secateur.search.executors.cluster.lazy_ray import load_ray

CHUNK_BYTES = 64 << 20

SMALL_BYTES = 1 << 20
"""Largest file compared by content; larger ones are compared by size."""

_DONE = ".whole"


class StagingError(RuntimeError):
    """Failure to copy a directory to a node."""


@dataclass(frozen=True)
class File:
    """One file of a folder: its relative path, its size in bytes, and the SHA-256 of a small one."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Folder:
    """A directory on the driver's node.

    Args:
        path: on the driver's node.
        files: all files, sorted by name.
    """

    path: str
    files: tuple[File, ...]

    @property
    def digest(self) -> str:
        """Hash of the files, by what `File` holds."""
        return hashlib.sha256(repr(self.files).encode()).hexdigest()[:16]


def describe(directory: Path) -> Folder:
    """Folder of a directory, without hidden files and directories."""
    found = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    seen = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    files = [_file(directory / path, path.as_posix()) for path in seen]
    return Folder(str(directory.resolve()), tuple(files))


def _file(path: Path, name: str) -> File:
    size = path.stat().st_size
    return File(name, size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= SMALL_BYTES else "")


def local_copy(folder: Folder, file_server: Any) -> str:
    """Path of a folder on this node: the driver's path if its content is equal here, else a copy in the cache.

    The first process of a node makes the copy, the others wait for it.

    Args:
        folder: on the driver's node.
        file_server: actor to copy from, or None.

    Raises:
        StagingError: if the folder is not on this node and can't be copied.
    """
    if _in_place(folder):
        return folder.path
    if file_server is None:
        raise StagingError(f"Expected {folder.path} with the same files as on the driver's node, got others.")
    root = staged()
    target = root / folder.digest
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.digest}.lock", fallback_to_soft=False):
        if not (target / _DONE).exists():
            _copy(folder, target, file_server)
    return str(target)


def staged() -> Path:
    """Directory for copies in the user's cache, which `pruners` finds too."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SECATEUR_CACHE") or base / "secateur") / "staged"


def _in_place(folder: Folder) -> bool:
    root = Path(folder.path)
    return all((root / f.name).is_file() and _file(root / f.name, f.name) == f for f in folder.files)


def _copy(folder: Folder, target: Path, file_server: Any) -> None:
    needed, free = sum(file.size for file in folder.files), shutil.disk_usage(target.parent).free
    if free < needed:
        raise StagingError(
            f"Expected {needed / 1e6:,.0f} MB free in {target.parent}, got {free / 1e6:,.0f} MB. Free some, "
            f"or set SECATEUR_CACHE on this node to a larger disk."
        )
    for file in folder.files:
        path = target / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("wb") as out:
            for offset in range(0, file.size, CHUNK_BYTES):
                chunk = _get(file_server.read.remote(folder.path, file.name, offset))
                digest.update(chunk)
                out.write(chunk)
        expected = _get(file_server.digest.remote(folder.path, file.name))
        if digest.hexdigest() != expected:
            raise StagingError(f"Expected {path} with SHA-256 {expected}, got {digest.hexdigest()}.")
    (target / _DONE).touch()


def _get(reference: Any) -> Any:
    return load_ray().get(reference)


class FileServer:
    """Server for files of given folders, run as a Ray actor on the driver's node: nodes may share no disk."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self._known = {folder.path: {file.name for file in folder.files} for folder in folders}

    def read(self, folder: str, name: str, offset: int) -> bytes:
        """At most `CHUNK_BYTES` of a file, from an offset."""
        with self._path(folder, name).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)

    def digest(self, folder: str, name: str) -> str:
        """SHA-256 of a file."""
        return _sha256(self._path(folder, name))

    def _path(self, folder: str, name: str) -> Path:
        if name not in self._known.get(folder, ()):  # serve no other file of the driver's disk
            raise StagingError(f"Expected a file of the run, got {name} in {folder}.")
        return Path(folder) / name


class Receiver:
    """Receiver of files for one directory, run as a Ray actor on the driver's node: nodes may share no disk.

    Args:
        directory: of the files.
        names: of files that are accepted.
    """

    def __init__(self, directory: str, names: Collection[str]) -> None:
        self._directory, self._names = Path(directory), frozenset(names)

    def write(self, name: str, offset: int, chunk: bytes) -> None:
        """Write a part of a file, which is not there before `finish`; parts come in order."""
        with self._arriving(name).open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(chunk)

    def finish(self, name: str, digest: str) -> None:
        """Put a file in its place, whole.

        Raises:
            StagingError: if its SHA-256 is another.
        """
        arriving = self._arriving(name)
        with arriving.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise StagingError(f"Expected {name} with SHA-256 {digest}, got {found}.")
        arriving.replace(self._directory / name)

    def _arriving(self, name: str) -> Path:
        if name not in self._names:  # write no other file of the driver's disk
            raise StagingError(f"Expected a file of the level store, got {name}.")
        return self._directory / f".{name}.arriving"


def send(path: Path, receiver: Any) -> None:
    """Send a file to a `Receiver`.

    Raises:
        StagingError: if it arrives damaged.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset in range(0, max(path.stat().st_size, 1), CHUNK_BYTES):
            chunk = file.read(CHUNK_BYTES)
            digest.update(chunk)
            _get(receiver.write.remote(path.name, offset, chunk))
    _get(receiver.finish.remote(path.name, digest.hexdigest()))


@cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
