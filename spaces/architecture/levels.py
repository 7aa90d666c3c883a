"""Which numbers of KV groups and channels a block may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.shape import BlockShape, ModelShape

Unit = Literal["groups", "channels", "attention", "mlp", "blocks"]


@dataclass(frozen=True)
class BlockLevels:
    """The numbers that may be kept of one block, descending from the dense one; 0 where it may go whole."""

    kv_groups: tuple[int, ...]
    ffn: tuple[int, ...]


@dataclass(frozen=True)
class LevelRules:
    """What makes the levels.

    Args:
        units: what may be removed: single KV ``groups`` and FFN ``channels``, whole ``attention`` and ``mlp``
            sub-layers, or whole ``blocks``.
        ffn_step: channels from one level to the next; None: see `default_step`.
        multiple_of: divides every number of channels that is kept.
        smallest_mlp: channels that an MLP keeps beside an attention, where a format can't go without.
        protect: indices of blocks that stay dense.
        n_steps: about how many levels there are where `ffn_step` is None.
        held_groups: numbers of KV groups that a format can hold; None: all.
    """

    units: frozenset[Unit]
    ffn_step: int | None = None
    multiple_of: int = 1
    smallest_mlp: int = 0
    protect: frozenset[int] = frozenset()
    n_steps: int = 12
    held_groups: frozenset[int] | None = None

    def levels(self, shape: ModelShape) -> tuple[BlockLevels, ...]:
        """The levels of each block. The first block keeps a KV group: caches read their length from it.

        Raises:
            ValueError: if the model's blocks were not counted, or the rules don't fit them.
        """
        if not shape.blocks:
            raise ValueError(
                "Expected a model whose blocks are counted for the space architecture, got none."
            )
        for index in sorted(self.protect):
            if not 0 <= index < len(shape.blocks):
                raise ValueError(
                    f"Expected `protect` to hold indices of blocks from 0 to {len(shape.blocks) - 1}, got {index}."
                )
        return tuple(self._of(block, index) for index, block in enumerate(shape.blocks))

    def _of(self, block: BlockShape, index: int) -> BlockLevels:
        kv_groups, ffn = [block.n_kv_groups], [block.ffn_width]
        if index not in self.protect:
            if "groups" in self.units:
                fewer = range(block.n_kv_groups - 1, 0, -1)
                kv_groups += [n for n in fewer if self.held_groups is None or n in self.held_groups]
            if "channels" in self.units:
                ffn += self._widths(block, index)
            if self.units & {"attention", "blocks"} and index:
                kv_groups.append(0)
            if "mlp" in self.units or ("blocks" in self.units and index):
                smallest = self.smallest_mlp if "mlp" in self.units else 0
                ffn += [smallest] if smallest < ffn[-1] else []
        return BlockLevels(tuple(kv_groups), tuple(ffn))

    def _widths(self, block: BlockShape, index: int) -> list[int]:
        """The numbers of channels between all and none, descending."""
        width = block.ffn_width
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
    """About a width/n_steps, a multiple of `multiple_of`, and if possible one that divides the width."""
    ideal = width / n_steps
    near = range(multiple_of, max(multiple_of, int(2 * ideal)) + 1, multiple_of)
    fitting = [step for step in near if width % step == 0 and step >= ideal / 2]
    step = min(fitting or near, key=lambda step: abs(step - ideal))
    return int(step)


@dataclass(frozen=True)
class Slot:
    """What changes together.

    Args:
        name: e.g. ``block3.mlp``.
        block: index of the block.
        kv_groups: for each option, the dense one first, what is kept; empty where the slot leaves them alone.
        ffn: likewise.
        removable: whether the last option removes it whole.
    """

    name: str
    block: int
    kv_groups: tuple[int, ...]
    ffn: tuple[int, ...]
    removable: bool

    @property
    def n_options(self) -> int:
        return len(self.kv_groups or self.ffn)

    @property
    def kind(self) -> str:
        """``attention``, ``mlp`` or ``block``."""
        return "block" if self.kv_groups and self.ffn else "attention" if self.kv_groups else "mlp"

    def kept(self, option: int, before: Kept) -> Kept:
        """What the block keeps with this option, of what it kept before."""
        return Kept(
            self.kv_groups[option] if self.kv_groups else before.kv_groups,
            self.ffn[option] if self.ffn else before.ffn,
        )

    def option_of(self, kept: Kept) -> int:
        """The option with which the block keeps this.

        Raises:
            ValueError: if there is none.
        """
        if self.kv_groups:
            return self.kv_groups.index(kept.kv_groups)
        return self.ffn.index(kept.ffn)

    @property
    def shares(self) -> tuple[float, ...]:
        """Which fraction of the slot each option removes."""
        kept = self.kv_groups or self.ffn
        return tuple(1 - n / kept[0] for n in kept)


def slots_of(levels: Sequence[BlockLevels], units: frozenset[Unit]) -> tuple[Slot, ...]:
    """The slots that have a choice: blocks where they go whole alone, else sub-layers."""
    slots = []
    for block, of in enumerate(levels):
        if units == {"blocks"}:
            slots.append(Slot(f"block{block}", block, of.kv_groups, of.ffn, True))
        else:
            removable = of.kv_groups[-1] == 0
            slots.append(Slot(f"block{block}.attention", block, of.kv_groups, (), removable))
            slots.append(Slot(f"block{block}.mlp", block, (), of.ffn, "mlp" in units))
    return tuple(slot for slot in slots if slot.n_options > 1)
