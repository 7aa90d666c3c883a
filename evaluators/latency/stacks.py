"""Short stacks of equal, cut blocks, exchanged for a model's own blocks while it is timed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.cutting import LiveSublayer, Piece
from secateur.pruners.models.layout import BlockLayout, SublayerLayout

STACK_BYTES = 1 << 30
"""Size that all stacks of one measurement together stay near."""

MOST_BLOCKS = 4
"""Blocks of a stack: several, since each finds its weights in memory, not in a processor's cache."""


def depth(anatomy: Anatomy, n_shapes: int) -> int:
    """Number of blocks in a stack, with one stack for each of `n_shapes` shapes."""
    block = anatomy.blocks[0].module
    n_bytes = sum(p.numel() * p.element_size() for p in block.parameters())
    return max(1, min(MOST_BLOCKS, len(anatomy.blocks), STACK_BYTES // (n_bytes * max(n_shapes, 1))))


def cut_stack(layouts: Sequence[BlockLayout], kv_groups: int, ffn: int) -> nn.ModuleList:
    """Copies of blocks, each with its first KV groups and FFN channels; 0: the sub-layer is removed."""
    return nn.ModuleList(_cut_copy(layout, kv_groups, ffn) for layout in layouts)


@contextmanager
def exchanged(anatomy: Anatomy, blocks: nn.ModuleList) -> Iterator[None]:
    """Run the model with these blocks while the context lasts."""
    path = anatomy.blocks[0].name.rpartition(".")[0]
    owner, _, name = path.rpartition(".")
    parent = anatomy.model.get_submodule(owner)
    setattr(parent, name, blocks)
    try:
        yield
    finally:
        setattr(parent, name, anatomy.container)


def _cut_copy(layout: BlockLayout, kv_groups: int, ffn: int) -> nn.Module:
    """Copy of a block, cut, with tensors of its own; the block is unchanged."""
    live = [LiveSublayer(sublayer) for sublayer in layout.sublayers]
    try:
        for sublayer, one, n_kept in zip(layout.sublayers, live, (kv_groups, ffn), strict=True):
            if n_kept:
                one.cut(n_kept, _first(sublayer, n_kept))
            else:
                one.remove()
        return copy.deepcopy(layout.block.module)
    finally:
        for one in live:
            one.restore()


def _first(sublayer: SublayerLayout, n_kept: int) -> dict[str, Piece]:
    """The first units of each projection; their choice does not change the time."""
    pieces = {}
    for placement in (*sublayer.placements, *sublayer.vectors):
        bias = placement.linear.bias
        if bias is not None and placement.axis == 0:
            bias = placement.first(bias, n_kept, sublayer.n_units).contiguous()
        weight = placement.first(placement.linear.weight, n_kept, sublayer.n_units)
        transposed = placement.linear.transposed  # contiguous as the module stores it
        weight = weight.T.contiguous().T if transposed else weight.contiguous()
        pieces[placement.linear.name] = Piece(weight, None if bias is None else bias.detach())
    return pieces
