"""Structure store: reordered weights of every block, memory-mapped, built once; a level is a view of them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from secateur.pruners.calibration.gradients import gradients_path, gradients_to_write, model_statistics
from secateur.pruners.calibration.kept_states import KeptStates, states_bytes
from secateur.pruners.calibration.stream import BlockStatistics, stream_blocks
from secateur.pruners.experts.channels import channels_of, experts_cut
from secateur.pruners.experts.levels import counts_of, expert_level, expert_levels
from secateur.pruners.models.anatomy import Anatomy, Sublayer
from secateur.pruners.models.check_kept import check_block, check_splits
from secateur.pruners.models.cutting import LiveSublayer, pass_through
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, MixtureLayout, SublayerLayout
from secateur.pruners.models.live_experts import LiveExperts, live_part
from secateur.pruners.stores.block_files import Key, StoredBlocks, build_store, recorded
from secateur.pruners.stores.recent import Recent
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.flap import standardised_flap
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.reorder import Count, ImportanceOrdered, reorder_by
from secateur.pruners.weights.level_store import device_bytes
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.architecture.scores import Scores
from secateur.spaces.method import Detail
from secateur.spaces.methods import CUT_REPAIRS

_INFLUENCE = "influence"


@dataclass(frozen=True)
class StructureKey(Key):
    """Identity of a structure store, which is used again only under an equal key.

    Args:
        model: fingerprint of the model.
        dtype: of the weights, e.g. ``float32``.
        calibration: hash of the calibration token ids.
        method: with the repairs that candidates may ask for.
        kv_groups: levels of attentions that are repaired, as numbers of kept groups. Without a repair every number is
            a level.
        ffn: likewise of MLPs, as numbers of kept channels.
        queries: of levels of attentions, beside 0: all, numbers of query heads that each KV group keeps.
    """

    model: str
    dtype: str
    calibration: str
    method: StructureMethod
    kv_groups: tuple[int, ...]
    ffn: tuple[int, ...]
    queries: tuple[int, ...] = ()
    expert_channels: bool = False
    shared: tuple[int, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """All of it as plain values, with the sources of the methods."""
        fields: dict[str, Any] = {"sources": self.method.sources}
        fields |= {name: value for name, value in super().record.items() if name != "method"}
        method = recorded(asdict(self.method))
        found = fields | method
        later = ("experts", "heads", "queries", "expert_channels", "shared")
        return {name: value for name, value in found.items() if name not in later or value}

    @property
    def streamed(self) -> dict[str, Any]:
        """Statistics that the store is built from, as keyword arguments of `stream_blocks`."""
        return streamed(self.method, expert_channels=self.expert_channels)

    @property
    def counts(self) -> dict[str, list[Count]]:
        """Levels to repair, by kind of sub-layer."""
        groups = [(n, queries) for queries in (0, *self.queries) for n in self.kv_groups]
        return {"attention": groups, "mlp": [(n, 0) for n in self.ffn]}


def streamed(method: StructureMethod, *, expert_channels: bool) -> dict[str, Any]:
    """Statistics that a method takes, as keyword arguments of `stream_blocks`."""
    detail: Detail = "gram" if method.needs == "gram" else "moments"
    return {"outputs": detail, "experts": bool(method.experts), "expert_outputs": expert_channels}


class StructureStore:
    """Levels of every sub-layer of a live model, from mapped files, one a block: workers on a node share a copy.

    Weights are pointed to, not copied: to views of the files, except where projections are fused contiguously (Phi3,
    GPT-2), whose parts are joined. Levels are not written to. A sub-layer of which all units are kept is the dense one
    itself. One that is removed whole gives zeros, its norms do nothing, and in a cache of keys and values it takes one
    number a token.

    Tensors are copied to the model's device when they are used, if it is another than that of the files; those used
    last are kept, in the room of the device for levels.

    Args:
        directory: of a built store.
        anatomy: the live model that it was built for, dense now.
    """

    def __init__(self, directory: Path, anatomy: Anatomy) -> None:
        self.layouts = find_layouts(anatomy, experts=True)
        n_bytes = 0 if anatomy.room else sum(linear.weight.nbytes for linear in anatomy.linears)
        copies = Recent[Tensor](n_bytes + device_bytes(anatomy))
        stored = StoredBlocks(directory, len(self.layouts))
        self._tensors = [
            _OnDevice(tensors, layout.block.linears[0].weight.device, copies)
            for layout, tensors in zip(self.layouts, stored, strict=True)
        ]
        self._dense = {
            x.output.name: x.output.weight
            for layout in self.layouts
            for x in layout.parts
            if isinstance(x, SublayerLayout)
        }
        self._passing: dict[int, RemovableHandle] = {}
        self._live = [[live_part(part) for part in layout.parts] for layout in self.layouts]

    @property
    def scores(self) -> Scores:
        """Scores of the dense model's units and blocks, for allocations."""
        attention, mlp, influence = [], [], []
        for layout, tensors in zip(self.layouts, self._tensors, strict=True):
            attention.append(_flap(layout.attention, tensors))
            mlp.append(_flap(layout.mlp, tensors))
            influence.append(float(tensors[_INFLUENCE]))
        return Scores(tuple(attention), tuple(mlp), tuple(influence))

    def ordered(self, block: int, kind: Sublayer) -> ImportanceOrdered:
        """Levels of a sub-layer."""
        return ImportanceOrdered(getattr(self.layouts[block], kind), self._tensors[block])

    def cut(self, block: int, kept: Kept, repair: str = "none") -> None:
        """Cut a block to the most important units of the dense one.

        Args:
            block: its index.
            kept: numbers of kept units. Block 0 keeps a KV group.
            repair: one that the store was built for; at its levels.

        Raises:
            ValueError: if the block can't be cut so, or the store lacks the repair at this level.
        """
        layout = self.layouts[block]
        if block in self._passing:
            self._passing.pop(block).remove()
        check_block(layout.block, kept)
        check_splits([layout], [kept])
        for part, live, (n_kept, queries) in zip(
            layout.parts, self._live[block], layout.counts(kept), strict=True
        ):
            if isinstance(live, LiveExperts) and (kept.channels or kept.shared):
                assert isinstance(part, MixtureLayout)
                live.cut(*experts_cut(part, self._tensors[block], kept, repair))
            elif n_kept == part.n_units and not queries:
                live.restore()
            elif n_kept == 0:
                live.remove()
            elif isinstance(live, LiveExperts):
                assert isinstance(part, MixtureLayout)
                live.cut(*expert_level(part, self._tensors[block], n_kept, repair))
            else:
                assert isinstance(part, SublayerLayout)
                assert isinstance(live, LiveSublayer)
                live.cut(n_kept, self.ordered(block, part.kind).pieces(n_kept, repair, queries), queries)
        if not any(kept.units) and not layout.vanishes:
            self._passing[block] = pass_through(layout.block.module)

    def outputs(self, block: int, kept: Kept, repair: str = "none") -> dict[str, Tensor]:
        """Weights of a cut block's output projections in their dense shapes, zero in the columns of removed units.

        By full name; arguments as of `cut`. What a repair adds to the bias is not part of it, nor are mixtures.
        """
        layout = self.layouts[block]
        found = {}
        for part, (n_kept, queries) in zip(layout.parts, layout.counts(kept), strict=True):
            if isinstance(part, MixtureLayout):
                continue
            dense = self._dense[part.output.name]
            if n_kept == part.n_units and not queries:
                found[part.output.name] = dense
                continue
            weight = torch.zeros_like(dense)
            if n_kept:
                ordered = self.ordered(block, part.kind)
                cut = ordered.pieces(n_kept, repair, queries)[part.output.name].weight
                weight[:, ordered.columns(n_kept, queries)] = cut
            found[part.output.name] = weight
        return found

    def restore(self) -> None:
        """Make the whole model dense again: the same tensors in the same parameters."""
        while self._passing:
            self._passing.popitem()[1].remove()
        for block in self._live:
            for live in block:
                live.restore()


class _OnDevice(UserDict[str, Tensor]):
    """Tensors of a block on a device; copies where that is not their own."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device, copies: Recent[Tensor]) -> None:
        super().__init__(tensors)
        self._device, self._copies = device, copies

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.data[name]
        if tensor.device == self._device:
            return tensor
        return self._copies.get((id(self), name), lambda: tensor.to(self._device))


@torch.no_grad()
def build_structure(
    directory: Path,
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    key: StructureKey,
    *,
    contrast: Int[Tensor, "others _"] | None = None,
    on_block: Callable[[int], None] = lambda index: None,
    only: Collection[int] | None = None,
) -> None:
    """Build the store from the dense model's activations, so that the levels of one sub-layer fit all of another.

    See `build_store`. Memory beyond the model: the hidden states of the calibration tokens, and one block's statistics
    and tensors.

    Args:
        directory: made if it is not there.
        anatomy: the dense model.
        tokens: calibration windows.
        key: identity; it says what to build.
        contrast: windows of the second calibration set, for importances that need one.
        on_block: told the index of each block that is done.
        only: see `build_store`.

    Raises:
        LevelStoreError: if there is no room on the disk.
        ValueError: if the model can't be cut (see `find_layouts`), or inputs are not finite.
    """
    layouts = find_layouts(anatomy, experts=True)
    method, counts = key.method, key.counts

    def make(missing: Collection[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        identity, gradients = f"{key.model} {key.calibration}", method.gradients if missing else ()
        path = gradients_path(directory)
        whole = model_statistics(
            anatomy, tokens, gradients=gradients, path=path, identity=identity, contrast=contrast
        )
        kept = KeptStates(directory, key.digest)
        for part in stream_blocks(anatomy, tokens, **key.streamed, missing=missing, kept=kept):
            layout = layouts[part.block.index]
            tensors: dict[str, Tensor] = {}
            for sub in layout.parts if part.block.index in missing else ():
                if isinstance(sub, MixtureLayout):
                    tensors |= _experts(method, sub, part, key.ffn)
                    if key.expert_channels:
                        tensors |= channels_of(sub, part, whole.gradients, method, key.shared)
                    continue
                inputs = part.outputs[sub.output.name]
                tensors |= reorder_by(method, sub, inputs, whole.gradients, counts[sub.kind])
            is_missing = part.block.index in missing
            yield part.block.index, tensors | _scores(layout, part) if is_missing else {}

    build_store(
        directory,
        key,
        len(layouts),
        lambda missing: (
            _n_bytes(directory, anatomy, [layouts[index] for index in missing], key)
            + states_bytes(anatomy, tokens)
        ),
        make,
        otherwise="use fewer levels or repairs",
        on_block=on_block,
        only=only,
    )


def _experts(
    method: StructureMethod, layout: MixtureLayout, part: BlockStatistics, repaired: Sequence[int]
) -> dict[str, Tensor]:
    """Levels of a mixture: all without a repair, these with one."""
    assert part.experts is not None, "collected where blocks have mixtures"
    every = counts_of(layout.mixture)
    some = [count for count in every if count in repaired]
    repairs = {name: every if name == "none" else some for name in method.of_experts}
    return expert_levels(layout, method.experts, part.experts, repairs)


def _scores(layout: BlockLayout, part: BlockStatistics) -> dict[str, Tensor]:
    """Tensors that `StructureStore.scores` reads."""
    found = {_INFLUENCE: torch.tensor(part.influence, dtype=torch.float64)}
    for sublayer in (x for x in layout.parts if isinstance(x, SublayerLayout)):
        evidence = Evidence(sublayer, part.outputs[sublayer.output.name], {}, dampening=0.0)
        found[_flap_name(sublayer)] = standardised_flap(evidence)
    return found


def _flap(part: SublayerLayout | MixtureLayout | None, tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Scores of the units of a sub-layer; none of a mixture, or where there is nothing."""
    return tuple(tensors[_flap_name(part)].tolist()) if isinstance(part, SublayerLayout) else ()


def _flap_name(layout: SublayerLayout) -> str:
    return f"{layout.output.name}.flap"


def _n_bytes(directory: Path, anatomy: Anatomy, todo: Sequence[BlockLayout], key: StructureKey) -> int:
    needed = structure_bytes(anatomy, todo, key)
    return needed + gradients_to_write(gradients_path(directory), anatomy, key.method.gradients)


def structure_bytes(anatomy: Anatomy, todo: Sequence[BlockLayout], key: StructureKey) -> int:
    """Upper bound of the bytes of a structure store's tensors of these blocks; the model may be without memory."""
    n_weights = 0
    n_repairs = sum(CUT_REPAIRS[name].gives in ("weight", "both") for name in key.method.of_sublayers)
    n_merges = len(key.method.of_experts) - 1
    for layout in todo:
        n_weights += sum(x.n_weights + x.out_features for x in layout.block.linears if x.expert is None)
        for part in layout.parts:
            if isinstance(part, MixtureLayout):
                n_weights += part.n_units * part.unit_params if key.expert_channels else 0
                n_weights += n_merges * part.unit_params * sum(n for n in key.ffn if n < part.n_units)
                continue
            columns = sum(n * part.unit_width for n, _ in key.counts[part.kind])
            n_weights += n_repairs * columns * part.output.out_features
    return n_weights * anatomy.dtype.itemsize
