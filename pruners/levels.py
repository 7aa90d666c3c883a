"""The level store: what is needed to switch each projection to each level, memory-mapped, built once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.pruners.calibration import BlockStatistics, stream_blocks
from secateur.pruners.families.anatomy import Anatomy, Linear
from secateur.pruners.gradients import model_statistics
from secateur.pruners.methods import Method
from secateur.pruners.statistics import ModelStatistics

INDEX = "store.json"
SPARE_BYTES = 1 << 20
CACHE_BYTES = 1 << 30
"""Weights made from ranks, or copied to a GPU, are kept up to so many bytes, those used last."""


@dataclass(frozen=True)
class StoreKey:
    """What a level store depends on; a store is used again only under an equal key.

    Args:
        model: fingerprint of the model.
        dtype: of the weights, e.g. ``float32``.
        calibration: hash of the calibration token ids.
        method: how levels are made.
        levels: sparsities, ascending from 0.0.
    """

    model: str
    dtype: str
    calibration: str
    method: Method
    levels: tuple[float, ...]

    @property
    def digest(self) -> str:
        """Content hash of all of it."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    @property
    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {x.name: getattr(self, x.name) for x in fields(self)} | {"method": self.method.record}


class LevelStoreError(ValueError):
    """The store can't be written or read; one line that says what to do."""


class LevelStore:
    """Weights of a projection at a level, by reference where the level is stored, else made from ranks.

    A metric's store has one byte a weight for all levels (the first level at which the weight goes). A
    reconstruction's has the weights of each level strictly between 0 and 1, in the model's dtype. Files are
    mapped, one a block: several processes on a node share one copy.

    Level 0 is the dense weight itself; at sparsity 1 the weight is zero.

    Args:
        directory: of a built store.
        anatomy: the model that it was built for; its weights are taken as the dense ones.
        levels: sparsities, ascending from 0.0.
    """

    def __init__(self, directory: Path, anatomy: Anatomy, levels: Sequence[float]) -> None:
        self._levels = tuple(levels)
        self._stored = _stored_levels(self._levels)
        self._dense = {linear.name: linear.weight for linear in anatomy.linears}
        self._tensors: dict[str, Tensor] = {}
        for block in anatomy.blocks:
            self._tensors |= _load(directory / _file_name(block.index))
        self._cache: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._cache_bytes = 0

    def weight(self, linear: Linear, level: int) -> Float[Tensor, "out in"]:
        """The projection's weight at a level, to be pointed to and not to be written to."""
        name = linear.name
        dense = self._dense[name]
        if level == 0:
            return dense
        if self._levels[level] >= 1:
            return torch.zeros_like(dense)
        stored = self._tensors[name]
        ranks = stored.dtype == torch.uint8
        if not ranks and dense.device == stored.device:
            return stored[self._stored.index(level)]
        return self._made((name, level), stored if ranks else stored[self._stored.index(level)], dense)

    def _made(self, key: tuple[str, int], stored: Tensor, dense: Tensor) -> Tensor:
        """Weights from ranks, or a copy on the model's device; those used last are kept."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        there = stored.to(dense.device)
        made = dense * (there > key[1]) if there.dtype == torch.uint8 else there
        self._cache[key] = made
        self._cache_bytes += made.nbytes
        while self._cache_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return made


def is_built(directory: Path, key: StoreKey) -> bool:
    """True if the directory holds a finished store under this key."""
    index = _read_index(directory)
    return index.get("digest") == key.digest and index.get("finished") is True


@torch.no_grad()
def build_levels(
    directory: Path,
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    key: StoreKey,
    *,
    on_block: Callable[[int], None] = lambda index: None,
) -> None:
    """Build the store from the dense model's activations, so that levels of one unit are independent of others.

    One file a block, each written beside its place and renamed; a build that was cut short goes on with the
    blocks that are missing. Blocks of another key are overwritten.

    Args:
        directory: made if it is not there.
        anatomy: the dense model.
        tokens: calibration windows.
        key: identity; its method and levels say what to build.
        on_block: told the index of each block that is done.

    Raises:
        LevelStoreError: if there is no room on the disk.
        ValueError: as `Method.weights` does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    resumed = _read_index(directory).get("digest") == key.digest
    todo = [
        block.index
        for block in anatomy.blocks
        if not (resumed and (directory / _file_name(block.index)).exists())
    ]
    _check_room(directory, anatomy, key, todo)
    _write_index(directory, key, finished=False)
    whole = _whole_model(directory, anatomy, tokens, key)
    for part in _statistics(anatomy, tokens, key.method):
        index = part.block.index
        if index in todo:
            tensors = {linear.name: _levels_of(linear, part, whole, key) for linear in part.block.linears}
            _save(tensors, directory / _file_name(index))
        on_block(index)
    _write_index(directory, key, finished=True)


def _check_room(directory: Path, anatomy: Anatomy, key: StoreKey, todo: Sequence[int]) -> None:
    """Fail early: writing to a mapped file on a full disk would end the process with a signal."""
    n_weights = sum(linear.n_weights for linear in anatomy.linears if linear.block in todo)
    per_weight = next(anatomy.linears).weight.element_size() * len(_stored_levels(key.levels))
    needed = n_weights * (per_weight if key.method.updates_weights else 1) + SPARE_BYTES
    if key.method.needs_gradients and not gradients_path(directory).exists():
        needed += sum(4 * linear.n_weights for linear in anatomy.linears)  # in fp32
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise LevelStoreError(
            f"Expected {needed / 1e6:,.0f} MB of room for the level store in {directory}, got {free / 1e6:,.0f} MB. "
            "Free some, or use fewer levels (`space.step`, `space.max_sparsity`), and run the same command."
        )


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise LevelStoreError(
            f"Expected to write {path}, got: {error}. Free some room on the disk and run the same command."
        ) from error
    temporary.replace(path)


def _statistics(anatomy: Anatomy, tokens: Tensor, method: Method):  # type: ignore[no-untyped-def]
    if method.needs == "nothing":
        return (BlockStatistics(block, {}) for block in anatomy.blocks)
    return stream_blocks(anatomy, tokens, gram=method.needs == "gram", sequential=False)


def _whole_model(directory: Path, anatomy: Anatomy, tokens: Tensor, key: StoreKey) -> ModelStatistics:
    """What a formula knows of the whole model; gradients are kept beside the store, for other formulas."""
    try:
        return model_statistics(
            anatomy,
            tokens,
            gradients=key.method.needs_gradients,
            path=gradients_path(directory),
            identity=f"{key.model} {key.calibration}",
        )
    except (SafetensorError, OSError) as error:
        raise LevelStoreError(
            f"Expected to write {gradients_path(directory)}, got: {error}. Free some room on the disk and run the "
            "same command."
        ) from error


def gradients_path(directory: Path) -> Path:
    """Where the gradients of the model of a level store are."""
    return directory.with_name(f"{directory.name}-gradients.safetensors")


def _levels_of(linear: Linear, part: BlockStatistics, whole: ModelStatistics, key: StoreKey) -> Tensor:
    inputs = part.inputs.get(linear.name)
    if not key.method.updates_weights:
        return key.method.ranks(linear, inputs, key.levels, whole).contiguous().cpu()
    sparsities = [key.levels[level] for level in _stored_levels(key.levels)]
    return key.method.weights(linear, inputs, sparsities).contiguous().cpu()


def _stored_levels(levels: Sequence[float]) -> list[int]:
    return [index for index, level in enumerate(levels) if 0 < level < 1]


def _file_name(block: int) -> str:
    return f"block-{block:04d}.safetensors"


def _load(path: Path) -> dict[str, Tensor]:
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


def _write_index(directory: Path, key: StoreKey, *, finished: bool) -> None:
    index = {"digest": key.digest, "finished": finished, "key": key.record}
    temporary = directory / f"{INDEX}.tmp"
    temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
    temporary.replace(directory / INDEX)
