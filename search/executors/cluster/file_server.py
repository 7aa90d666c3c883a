"""Transfer of files from the driver's node to workers on nodes without a shared disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from secateur.search.executors.cluster.staging import CHUNK_BYTES, Folder, StagingError


class FileServer:
    """Server for files of given folders, run as a Ray actor on the driver's node."""

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


@cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
