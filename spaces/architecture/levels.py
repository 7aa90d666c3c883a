"""Levels of a block: the numbers of KV groups and channels it may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.shape import BlockShape, ExpertShape, ModelShape

Removable = Literal[
    "groups", "heads", "channels", "experts", "expert_channels", "attention", "mlp", "blocks", "hidden"
]


@dataclass(frozen=True)
class BlockLevels:
    """Levels of one block, descending from the dense numbers; 0 if the sub-layer is removable.

    Args:
        queries: of query heads of a kept KV group; 0, the first one: all.
        channels: of channels of each routed expert; 0, the first one: all.
        shared: likewise of the shared experts.
    """

    kv_groups: tuple[int, ...]
    ffn: tuple[int, ...]
    queries: tuple[int, ...] = (0,)
    channels: tuple[int, ...] = (0,)
    shared: tuple[int, ...] = (0,)

    @property
    def is_droppable(self) -> bool:
        """True if the whole block may go."""
        return self.kv_groups[-1] == self.ffn[-1] == 0 and max(len(self.kv_groups), len(self.ffn)) > 1


@dataclass(frozen=True)
class LevelRules:
    """Rules for the levels.

    Args:
        units: removable units: single KV ``groups`` and FFN ``channels``, query ``heads`` (of each KV group equally
            many), routed ``experts``, ``expert_channels`` (of each routed expert of a block equally many, and of the
            shared ones), whole ``attention`` and ``mlp`` sub-layers, whole ``blocks``, or ``hidden`` channels of the
            whole model.
        ffn_step: channels between levels; None: see `default_step`, as for experts.
        multiple_of: divisor of every number of kept channels.
        smallest_mlp: least channels of an MLP beside an attention, for formats that require an MLP.
        protect: indices of blocks kept dense.
        n_steps: approximate number of levels if `ffn_step` is None.
        held_groups: numbers of KV groups that the format supports; None: all.
    """

    units: frozenset[Removable]
    ffn_step: int | None = None
    multiple_of: int = 1
    smallest_mlp: int = 0
    protect: frozenset[int] = frozenset()
    n_steps: int = 12
    held_groups: frozenset[int] | None = None

    def levels(self, shape: ModelShape) -> tuple[BlockLevels, ...]:
        """Levels of each block. The first block keeps a KV group, if it has any: caches read their length from it.

        Raises:
            ValueError: if the shape has no blocks, or the rules don't fit them.
        """
        if not shape.blocks:
            raise ValueError("Expected a model with known block shapes for the space architecture, got none.")
        for index in sorted(self.protect):
            if not 0 <= index < len(shape.blocks):
                raise ValueError(
                    f"Expected `protect` to hold indices of blocks from 0 to {len(shape.blocks) - 1}, got {index}."
                )
        return tuple(self._of(block, index) for index, block in enumerate(shape.blocks))

    def _of(self, block: BlockShape, index: int) -> BlockLevels:
        kv_groups, ffn = [block.n_kv_groups], [block.ffn_width]
        if index not in self.protect:
            if "groups" in self.units and not block.rigid:
                fewer = range(block.n_kv_groups - 1, 0, -1)
                kv_groups += [n for n in fewer if self.held_groups is None or n in self.held_groups]
            if "channels" in self.units and block.experts is None and not block.rigid_ffn:
                ffn += self._widths(block.ffn_width, index)
            if "experts" in self.units and block.experts is not None:
                ffn += self._numbers_of_experts(block.ffn_width, block.experts)
            if self.units & {"attention", "blocks"} and index and block.n_kv_groups:
                kv_groups.append(0)
            if "mlp" in self.units or ("blocks" in self.units and index):
                smallest = self.smallest_mlp if "mlp" in self.units and not block.rigid_ffn else 0
                ffn += [smallest] if smallest < ffn[-1] else []
        free = index not in self.protect
        splits = "heads" in self.units and free
        of = block.experts if "expert_channels" in self.units and free else None
        return BlockLevels(
            tuple(kv_groups),
            tuple(ffn),
            (0, *range(block.n_queries - 1, 0, -1)) if splits else (0,),
            (0, *(self._widths(of.channels, index) if of and of.channels else ())),
            (0, *(self._widths(of.shared, index) if of and of.shared else ())),
        )

    def _numbers_of_experts(self, n_experts: int, of: ExpertShape) -> list[int]:
        """Numbers of experts between all and none, descending."""
        step = default_step(n_experts, of.multiple, self.n_steps)
        return [kept for kept in range(n_experts - step, 0, -step) if kept >= of.fewest]

    def _widths(self, width: int, index: int) -> list[int]:
        """Numbers of channels between all and none, descending."""
        step = self.ffn_step or default_step(width, self.multiple_of, self.n_steps)
        if width % self.multiple_of:
            fitting = [m for m in range(1, self.multiple_of) if width % m == 0]
            raise ValueError(
                f"Expected `multiple_of` to divide the FFN width, got {self.multiple_of} for {width} channels "
                f"at block {index}. Use {fitting[-1]}."
            )
        if self.ffn_step is not None and step >= width:
            raise ValueError(
                f"Expected `ffn_step` below the FFN width, got {step} for {width} channels at block {index}. Use "
                f"{default_step(width, self.multiple_of, self.n_steps)}."
            )
        return [kept for kept in range(width - step, 0, -step) if kept >= self.smallest_mlp]


def default_step(width: int, multiple_of: int, n_steps: int) -> int:
    """Multiple of `multiple_of` near width / n_steps, a divisor of the width if possible."""
    ideal = width / n_steps
    near = range(multiple_of, max(multiple_of, int(2 * ideal)) + 1, multiple_of)
    fitting = [step for step in near if width % step == 0 and step >= ideal / 2]
    step = min(fitting or near, key=lambda step: abs(step - ideal))
    return int(step)


@dataclass(frozen=True)
class Slot:
    """Part of a block with one level.

    Args:
        name: e.g. ``block3.mlp``.
        block: index of the block.
        kv_groups: kept KV groups of each option, the dense number first; empty if the slot has none.
        ffn: kept channels, likewise.
        removable: whether the last option removes the slot as a whole.
        queries: query heads that each kept KV group keeps in each option, 0: all; empty if they are never cut.
        gone: with them, or with channels, share of the slot that each option removes.
        channels: of each routed expert in each option, 0: all; empty if they are never cut.
        shared: channels of shared experts in each option, 0: all; empty unless it is their slot.
        alone: whether it is all of its block.
    """

    name: str
    block: int
    kv_groups: tuple[int, ...]
    ffn: tuple[int, ...]
    removable: bool
    queries: tuple[int, ...] = ()
    gone: tuple[float, ...] = ()
    channels: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    alone: bool = False

    @property
    def n_options(self) -> int:
        return len(self.kv_groups or self.ffn or self.shared)

    @property
    def kind(self) -> str:
        """``attention``, ``mlp`` or ``block``."""
        return "block" if self.kv_groups and self.ffn else "attention" if self.kv_groups else "mlp"

    def kept(self, option: int, before: Kept) -> Kept:
        """Kept units of the block with this option; others as in `before`."""
        return Kept(
            self.kv_groups[option] if self.kv_groups else before.kv_groups,
            self.ffn[option] if self.ffn else before.ffn,
            self.queries[option] if self.queries else before.queries,
            self.channels[option] if self.channels else before.channels,
            self.shared[option] if self.shared else before.shared,
        )

    def option_of(self, kept: Kept) -> int:
        """Option of these kept units; a ValueError if there is none."""
        if self.shared:
            return self.shared.index(kept.shared)
        if self.queries:
            return list(zip(self.kv_groups, self.queries, strict=True)).index((kept.kv_groups, kept.queries))
        if self.channels:
            return list(zip(self.ffn, self.channels, strict=True)).index((kept.ffn, kept.channels))
        return self.kv_groups.index(kept.kv_groups) if any(self.kv_groups) else self.ffn.index(kept.ffn)

    @property
    def shares(self) -> tuple[float, ...]:
        """Fraction of the slot removed by each option."""
        if self.gone:
            return self.gone
        kept = self.kv_groups if any(self.kv_groups) else self.ffn
        return tuple(1 - n / kept[0] for n in kept)


def slots_of(
    levels: Sequence[BlockLevels], units: frozenset[Removable], blocks: Sequence[BlockShape]
) -> tuple[Slot, ...]:
    """Slots with more than one option: blocks if only these are removable, else sub-layers."""
    slots = []
    for block, of in enumerate(levels):
        if units == {"blocks"}:
            n_options = max(len(of.kv_groups), len(of.ffn))
            groups, ffn = (
                (*each, 0)[:n_options] for each in (of.kv_groups, of.ffn)
            )  # 0 of what is not there
            slots.append(Slot(f"block{block}", block, groups, ffn, True))
        else:
            alone = not (of.kv_groups[0] and of.ffn[0])
            removable = of.kv_groups[-1] == 0
            attention = Slot(f"block{block}.attention", block, of.kv_groups, (), removable, alone=alone)
            slots.append(attention if len(of.queries) == 1 else _with_queries(attention, of, blocks[block]))
            mlp = Slot(f"block{block}.mlp", block, (), of.ffn, "mlp" in units, alone=alone)
            slots.append(mlp if len(of.channels) == 1 else _with_channels(mlp, of, blocks[block]))
            slots.append(_of_shared(Slot(f"block{block}.shared", block, (), (), False), of, blocks[block]))
    return tuple(slot for slot in slots if slot.n_options > 1)


def _with_channels(slot: Slot, of: BlockLevels, shape: BlockShape) -> Slot:
    """The slot with an option for each number of experts and of channels in each, by ascending removed share."""
    assert shape.experts is not None, "channels of experts have levels where there are some"
    of_channel = shape.experts.channel_params / shape.channel_params
    options = [
        (1 - n * (1 - (of_channel * (shape.experts.channels - m) if m else 0.0)) / of.ffn[0], n, m)
        for n in of.ffn
        for m in (of.channels if n else (0,))
    ]
    options.sort(key=lambda option: option[0])
    return replace(
        slot,
        ffn=tuple(n for _, n, _ in options),
        channels=tuple(m for _, _, m in options),
        gone=tuple(gone for gone, _, _ in options),
    )


def _of_shared(slot: Slot, of: BlockLevels, shape: BlockShape) -> Slot:
    """The slot of shared experts, with an option for each number of their channels; without options if they stay."""
    if shape.experts is None or len(of.shared) == 1:
        return slot
    gone = tuple(1 - (m or shape.experts.shared) / shape.experts.shared for m in of.shared)
    return replace(slot, shared=of.shared, gone=gone)


def _with_queries(slot: Slot, of: BlockLevels, shape: BlockShape) -> Slot:
    """The slot with an option for each number of KV groups and of query heads in each, by ascending removed share."""
    dense = of.kv_groups[0]
    options = []
    for groups in of.kv_groups:
        for queries in of.queries if groups else (0,):
            without = shape.query_share * (shape.n_queries - queries) if queries else 0.0
            options.append((1 - groups * (1 - without) / dense, groups, queries))
    options.sort(key=lambda option: option[0])
    return replace(
        slot,
        kv_groups=tuple(groups for _, groups, _ in options),
        queries=tuple(queries for _, _, queries in options),
        gone=tuple(gone for gone, _, _ in options),
    )
