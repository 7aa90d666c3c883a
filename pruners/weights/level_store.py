"""Level store: ranks or weights of each projection at each level, memory-mapped, built once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.gradients import gradients_path, gradients_to_write, model_statistics
from secateur.pruners.calibration.kept_states import KeptStates, states_bytes
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import BlockStatistics, stream_blocks
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.stores.block_files import Key, StoredBlocks, build_store, load_block
from secateur.pruners.stores.device_blocks import DeviceBlocks
from secateur.pruners.stores.recent import Recent
from secateur.pruners.weights.method import Method
from secateur.spaces.levels import Sparsities, sparsities_of

CACHE_BYTES = 1 << 30
"""Size of the cache of weights copied to a device whose room is not known."""


@dataclass(frozen=True)
class StoreKey(Key):
    """Identity of a level store, which is used again only under an equal key.

    Args:
        model: fingerprint of the model.
        dtype: of the weights, e.g. ``float32``.
        calibration: hash of the calibration token ids.
        method: of pruning.
        levels: sparsities, ascending from 0.0; by a projection's number of weights or its name where they
            differ.
        expected: level of each projection, by name, in the model whose activations the levels are built from; None:
            of the dense model.
    """

    model: str
    dtype: str
    calibration: str
    method: Method
    levels: Sparsities
    expected: Mapping[str, float] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """All of it as plain values, with the source of the method; without `expected` where the model is dense."""
        record = super().record | {"method": self.method.record}
        if self.method.source is not None:
            record["source"] = self.method.source
        if self.expected is None:
            del record["expected"]
        return record


class LevelStore:
    """Weights of a projection at a level, by reference where the level is stored, else computed from ranks.

    A metric's store has one byte a weight for all levels (the first level at which the weight is pruned). A
    reconstruction's has the weights of each level strictly between 0 and 1, in the model's dtype. Files are
    mapped, one a block: several processes on a node share one copy. Ranks are used on the model's device, see
    `DeviceBlocks`; of stored weights those used last are kept there.

    Level 0 is the dense weight itself; at sparsity 1 the weight is zero.

    Args:
        directory: of a built store.
        anatomy: the model that it was built for; its weights are taken as the dense ones.
        levels: sparsities, ascending from 0.0; by a projection's number of weights or its name where they
            differ.
    """

    def __init__(self, directory: Path, anatomy: Anatomy, levels: Sparsities) -> None:
        self._levels = levels
        self._dense = {linear.name: linear.weight for linear in anatomy.linears}
        self._blocks = StoredBlocks(directory, len(anatomy.blocks))
        limit = device_bytes(anatomy)
        devices = [block.linears[0].weight.device for block in anatomy.blocks]
        self._ranks = DeviceBlocks(self._blocks, devices, limit)
        self._recent = Recent[Tensor](limit)
        self._spare: dict[tuple[torch.device, torch.Size], list[Tensor]] = {}

    def weight(self, linear: Linear, level: int) -> Float[Tensor, "out in"]:
        """The projection's weight at a level, to be pointed to and not to be written to."""
        name = linear.name
        dense, stored = self._dense[name], self._blocks[linear.block][name]
        levels = sparsities_of(self._levels, linear.n_weights, linear.name)
        if 0 < levels[level] < 1:
            if stored.dtype == torch.uint8:
                return self._masked(dense, self._ranks[linear.block][name] > level)
            if dense.device != stored.device:
                return self._recent.get((name, level), lambda: _at_level(dense, stored, levels, level))
        return _at_level(dense, stored, levels, level)

    def take_back(self, linear: Linear, level: int) -> None:
        """Point a projection at this level to its dense weight again; the memory of a product serves the next one."""
        name, weight = linear.name, linear.weight
        linear.point_to(self._dense[name])
        stored = self._blocks[linear.block][name]
        sparsity = sparsities_of(self._levels, linear.n_weights, linear.name)[level]
        if 0 < sparsity < 1 and stored.dtype == torch.uint8:
            self._spare.setdefault((weight.device, weight.shape), []).append(weight)

    def _masked(self, dense: Tensor, kept: Tensor) -> Tensor:
        """Product in memory that was taken back, if there is some: fresh memory costs nearly as much as the product."""
        spare = self._spare.get((dense.device, dense.shape))
        return torch.mul(dense, kept, out=spare.pop()) if spare else dense * kept


def device_bytes(anatomy: Anatomy) -> int:
    """Most bytes of levels that stay on the devices of a model."""
    return CACHE_BYTES if anatomy.room is None else anatomy.room.levels


@torch.no_grad()
def build_levels(
    directory: Path,
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    key: StoreKey,
    *,
    contrast: Int[Tensor, "others _"] | None = None,
    on_block: Callable[[int], None] = lambda index: None,
    only: Collection[int] | None = None,
) -> None:
    """Build the store, so that levels of one unit are independent of others; see `build_store`.

    Activations are the dense model's, or, with `key.expected`, those behind blocks that are pruned at their expected
    levels by the store's own method. That is the error accumulation of Týr-the-Pruner (Li et al. 2025, arXiv
    2503.09657) as its code means it (the paper averages the weights of all levels; the code takes the expected one).

    Args:
        directory: made if it is not there.
        anatomy: the dense model; dense again afterwards.
        tokens: calibration windows.
        key: identity; its method, levels and expected levels say what to build.
        contrast: windows of the second calibration set, for methods that need one.
        on_block: told the index of each block that is done.
        only: see `build_store`.

    Raises:
        LevelStoreError: if there is no room on the disk.
        ValueError: as `Method.weights` does.
    """

    def make(missing: Collection[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        identity = f"{key.model} {key.calibration}"
        whole = model_statistics(
            anatomy,
            tokens,
            gradients=key.method.gradients,
            path=gradients_path(directory),
            identity=identity,
            contrast=contrast,
        )
        expected = key.expected or {}
        dense = {linear.name: linear.weight for linear in anatomy.linears}
        try:
            walk: dict[str, Any] = {"inputs": key.method.needs, "sequential": bool(expected)}
            kept = KeptStates(directory, key.digest)
            for part in stream_blocks(anatomy, tokens, **walk, missing=missing, kept=kept):
                block, found = part.block, {}
                if block.index in missing:
                    found = {linear.name: _levels_of(linear, part, whole, key) for linear in block.linears}
                elif expected:
                    found = load_block(directory, block.index)
                for linear in block.linears if expected else ():
                    levels = sparsities_of(key.levels, linear.n_weights, linear.name)
                    level = levels.index(expected[linear.name])
                    linear.point_to(_at_level(linear.weight, found[linear.name], levels, level))
                yield block.index, found
        finally:
            for linear in anatomy.linears:
                linear.point_to(dense[linear.name])

    build_store(
        directory,
        key,
        len(anatomy.blocks),
        lambda missing: _n_bytes(directory, anatomy, key, missing) + states_bytes(anatomy, tokens),
        make,
        otherwise="use fewer levels (`space.step`, `space.max_sparsity`)",
        on_block=on_block,
        only=only,
    )


def _n_bytes(directory: Path, anatomy: Anatomy, key: StoreKey, missing: Collection[int]) -> int:
    needed = level_bytes(anatomy, key.levels, key.method, missing)
    return needed + gradients_to_write(gradients_path(directory), anatomy, key.method.gradients)


def level_bytes(
    anatomy: Anatomy, levels: Sparsities, method: Method, blocks: Collection[int] | None = None
) -> int:
    """Bytes of the tensors of a level store, of these blocks alone or of all; the model may be without memory."""
    needed = 0
    for linear in anatomy.linears:
        n_levels = len(_stored_levels(sparsities_of(levels, linear.n_weights, linear.name)))
        per_weight = anatomy.dtype.itemsize * n_levels if method.updates_weights else 1
        needed += linear.n_weights * per_weight if blocks is None or linear.block in blocks else 0
    return needed


def _levels_of(linear: Linear, part: BlockStatistics, whole: ModelStatistics, key: StoreKey) -> Tensor:
    inputs, levels = part.inputs.get(linear.name), sparsities_of(key.levels, linear.n_weights, linear.name)
    if not key.method.updates_weights:
        return key.method.ranks(linear, inputs, levels, whole)
    return key.method.weights(linear, inputs, [levels[level] for level in _stored_levels(levels)], whole)


def _at_level(
    dense: Float[Tensor, "out in"], stored: Tensor, levels: Sequence[float], level: int
) -> Float[Tensor, "out in"]:
    """A projection's weight at a level, from its stored ranks or weights."""
    if level == 0:
        return dense
    if levels[level] >= 1:
        return torch.zeros_like(dense)
    if stored.dtype == torch.uint8:
        return dense * (stored.to(dense.device) > level)
    return stored[_stored_levels(levels).index(level)].to(dense.device)


def _stored_levels(levels: Sequence[float]) -> list[int]:
    return [index for index, level in enumerate(levels) if 0 < level < 1]
