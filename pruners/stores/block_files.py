"""Stores of tensors in files, one a block, with an index of their key; and single files under an identity."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.spaces.plain_files import check_plain
from secateur.spaces.whole_file import whole_file

INDEX = "store.json"
SPARE_BYTES = 1 << 20
SHA256 = "sha256"
AGAIN = "Delete its directory: it is built again."


class LevelStoreError(ValueError):
    """A store that can't be written or read; one line with advice."""


def recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by the names that records and digests of stores and exports have for them."""
    return {"damp" if name == "dampening" else name: value for name, value in values.items()}


@dataclass(frozen=True)
class Key:
    """Identity of a store: the fields of a subclass are all that it depends on."""

    @property
    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return recorded({field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def digest(self) -> str:
        """Content hash of all of it."""
        return digest_of(self.record)


def digest_of(record: Mapping[str, Any]) -> str:
    """Content hash of plain values."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def is_built(directory: Path, key: Key) -> bool:
    """True if the directory holds a finished store under this key."""
    index = _read_index(directory)
    return index.get("digest") == key.digest and index.get("finished") is True


def finished_key(directory: Path) -> Mapping[str, Any] | None:
    """The record of the key of a finished store; None if there is none, or one whose index was damaged."""
    index = _read_index(directory)
    key = index.get("key")
    whole = isinstance(key, dict) and index.get("finished") is True and index.get("digest") == digest_of(key)
    return key if whole else None


def build_store(
    directory: Path,
    key: Key,
    n_blocks: int,
    room: Callable[[Collection[int]], int],
    make: Callable[[Collection[int]], Iterable[tuple[int, Mapping[str, Tensor]]]],
    *,
    otherwise: str,
    on_block: Callable[[int], None],
    only: Collection[int] | None = None,
) -> None:
    """Build a store, one file a block, each written whole or not at all.

    An interrupted build is continued with the missing blocks; blocks of another key are deleted first.

    Args:
        directory: made if it is not there.
        n_blocks: of the model.
        room: upper bound of the bytes of blocks, by their indices.
        make: from the indices of missing blocks to blocks with their tensors, in order; those of others are not used.
        otherwise: advice beside freeing some room on the disk, for the message.
        on_block: told the index of each block that is done.
        only: blocks to build, of a store that is not finished by it; None: all.

    Raises:
        LevelStoreError: if there is no room on the disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    begun = begun_digest(directory) == key.digest
    wanted = [index for index in range(n_blocks) if only is None or index in only]
    missing = [index for index in wanted if not (begun and block_path(directory, index).exists())]
    check_room(directory, room(missing), otherwise)
    if not begun:  # blocks of another key never lie beside this one's index, whenever the process is killed
        (directory / INDEX).unlink(missing_ok=True)
        for index in range(n_blocks):
            block_path(directory, index).unlink(missing_ok=True)
    _write_index(directory, key, finished=False)
    done = 0
    for index, tensors in make(missing) if missing else ():
        for before in range(done, index):
            on_block(before)
        if index in missing:
            save_block(tensors, directory, index)
        on_block(index)
        done = index + 1
    for after in range(done, n_blocks):
        on_block(after)
    if only is None:
        _write_index(directory, key, finished=True)


def begun_digest(directory: Path) -> str | None:
    """Digest of the key that the directory's blocks are built under, finished or not; None: of none."""
    found: str | None = _read_index(directory).get("digest")
    return found


def _write_index(directory: Path, key: Key, *, finished: bool) -> None:
    """Write the key of the directory's blocks."""
    index = {"digest": key.digest, "finished": finished, "key": key.record}
    with whole_file(directory / INDEX) as new:
        new.write_text(json.dumps(index, indent=1), encoding="utf-8")


def block_path(directory: Path, block: int) -> Path:
    """The file of a block."""
    return directory / f"block-{block:04d}.safetensors"


def check_room(directory: Path, n_bytes: int, otherwise: str, what: str = "the level store") -> None:
    """Raise a LevelStoreError if there is less room: a mapped file on a full disk would end the process by a signal.

    Args:
        otherwise: advice beside freeing some room, for the message.
        what: that will be written, for the message.
    """
    needed, free = n_bytes + SPARE_BYTES, shutil.disk_usage(directory).free
    if free < needed:
        raise LevelStoreError(
            f"Expected {needed / 1e6:,.0f} MB of room for {what} in {directory}, got {free / 1e6:,.0f} MB. "
            f"Free some, or {otherwise}, and run the same command."
        )


def save_block(tensors: Mapping[str, Tensor], directory: Path, block: int) -> None:
    """Write the tensors of a block, see `save_tensors`."""
    save_tensors(block_path(directory, block), tensors)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], identity: str | None = None) -> None:
    """Write named tensors into one file, whole or not at all.

    Args:
        tensors: on any device.
        identity: all that they depend on, in one text.

    Raises:
        LevelStoreError: if it can't be written.
    """
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {SHA256: _tensors_sha256(contiguous)} | ({} if identity is None else {"identity": identity})
    try:
        with whole_file(path) as new:
            save_file(contiguous, new, metadata=metadata)
            _checked.add(_state(new))
    except (SafetensorError, OSError) as error:
        raise LevelStoreError(
            f"Expected to write {path}, got: {error}. Free some room on the disk and run the same command."
        ) from error


class StoredBlocks(Sequence[dict[str, Tensor]]):
    """Tensors of all blocks of a store, mapped: processes on a node share one copy.

    The checksum of a block is checked when the block is used for the first time in a process.

    Raises:
        LevelStoreError: if one can't be read; at its first use, if it is not as it was written.
    """

    def __init__(self, directory: Path, n_blocks: int) -> None:
        self._files = [_MappedFile(block_path(directory, index)) for index in range(n_blocks)]

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(index, slice):
            return [file.checked() for file in self._files[index]]
        return self._files[index].checked()


class _MappedFile:
    """One file of named tensors, mapped.

    Raises:
        LevelStoreError: if it can't be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            check_plain(path)
            self._state = _state(path)
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
            self._tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise LevelStoreError(
                f"Expected a block of the level store, got {path} ({error}). {AGAIN}"
            ) from error

    def checked(self) -> dict[str, Tensor]:
        """The tensors; those of earlier versions have no checksum.

        Raises:
            LevelStoreError: if they are not as they were written.
        """
        if self._state not in _checked:
            written = self.metadata.get(SHA256)
            if written is not None and written != _tensors_sha256(self._tensors):
                raise LevelStoreError(
                    f"Expected the tensors that were written to {self._path}, got others: the file is damaged. {AGAIN}"
                )
            _checked.add(self._state)
        return self._tensors


_checked: set[tuple[int, ...]] = set()
"""Files whose tensors were checked, or written, by this process."""


def _state(path: Path) -> tuple[int, ...]:
    """Identity of a file with its present content."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def load_block(directory: Path, block: int) -> dict[str, Tensor]:
    """Checked tensors of a block, mapped.

    Raises:
        LevelStoreError: if they can't be read, or are not as they were written.
    """
    return _MappedFile(block_path(directory, block)).checked()


def load_tensors(path: Path, identity: str | None) -> dict[str, Tensor] | None:
    """Tensors saved under this identity, or under any if it is None, mapped; None if missing or damaged."""
    try:
        file = _MappedFile(path)
        return file.checked() if identity in (None, file.metadata.get("identity")) else None
    except LevelStoreError:
        return None


def _read_index(directory: Path) -> dict[str, Any]:
    try:
        check_plain(directory / INDEX)
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return index if isinstance(index, dict) else {}
