"""Files of a store, one a block, with an index that says what they were made under: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "store.json"
SPARE_BYTES = 1 << 20


class LevelStoreError(ValueError):
    """The store can't be written or read; one line that says what to do."""


@runtime_checkable
class Key(Protocol):
    """What a store depends on."""

    @property
    def digest(self) -> str:
        """Content hash of all of it."""
        ...

    @property
    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        ...


def digest_of(record: Mapping[str, Any]) -> str:
    """Content hash of plain values."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def is_finished(directory: Path, key: Key) -> bool:
    """True if the directory holds a finished store under this key."""
    index = _read_index(directory)
    return index.get("digest") == key.digest and index.get("finished") is True


def is_begun(directory: Path, key: Key) -> bool:
    """True if the blocks that are there were made under this key."""
    return _read_index(directory).get("digest") == key.digest


def write_index(directory: Path, key: Key, *, finished: bool) -> None:
    """Say what the directory's blocks are made under."""
    index = {"digest": key.digest, "finished": finished, "key": key.record}
    temporary = directory / f"{INDEX}.tmp"
    temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
    temporary.replace(directory / INDEX)


def block_path(directory: Path, block: int) -> Path:
    """The file of a block."""
    return directory / f"block-{block:04d}.safetensors"


def check_room(directory: Path, n_bytes: int, otherwise: str, what: str = "the level store") -> None:
    """Fail early: writing to a mapped file on a full disk would end the process with a signal.

    Args:
        directory: of the store.
        n_bytes: that will be written.
        otherwise: what else to do than to free some room.
        what: will be written.

    Raises:
        LevelStoreError: if there is less room.
    """
    needed, free = n_bytes + SPARE_BYTES, shutil.disk_usage(directory).free
    if free < needed:
        raise LevelStoreError(
            f"Expected {needed / 1e6:,.0f} MB of room for {what} in {directory}, got {free / 1e6:,.0f} MB. "
            f"Free some, or {otherwise}, and run the same command."
        )


def save_block(tensors: Mapping[str, Tensor], directory: Path, block: int) -> None:
    """Whole or not at all.

    Raises:
        LevelStoreError: if it can't be written.
    """
    path = block_path(directory, block)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(dict(tensors), temporary)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise LevelStoreError(
            f"Expected to write {path}, got: {error}. Free some room on the disk and run the same command."
        ) from error
    temporary.replace(path)


def load_block(directory: Path, block: int) -> dict[str, Tensor]:
    """Mapped: processes on a node share one copy.

    Raises:
        LevelStoreError: if it can't be read.
    """
    path = block_path(directory, block)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LevelStoreError(
            f"Expected a block of the level store, got {path} ({error}). Delete its directory: it is built again."
        ) from error


def _read_index(directory: Path) -> dict[str, object]:
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}
