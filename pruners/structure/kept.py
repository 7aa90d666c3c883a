"""What a block keeps, in numbers and by original index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.pruners.models.anatomy import Anatomy, Block


@dataclass(frozen=True)
class Kept:
    """How much of one block stays.

    Args:
        kv_groups: key/value heads, each with its query heads; 0 = the attention goes whole, with its norms.
        ffn: channels between up and down; 0 = the MLP goes whole, with its norms.
    """

    kv_groups: int
    ffn: int


@dataclass(frozen=True)
class KeptUnits:
    """Which units of one block stayed, by their numbers in the dense model, in the order in which they now stand.

    Args:
        kv_groups: key/value heads.
        channels: between up and down.
    """

    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]


def read_kept(config: Mapping[str, Any]) -> tuple[Kept, ...]:
    """The blocks of a plain configuration, ``{"blocks": [{"kv_groups": 3, "ffn": 1536}, ...]}``."""
    return tuple(Kept(block["kv_groups"], block["ffn"]) for block in config["blocks"])


def check_kept(anatomy: Anatomy, blocks: Sequence[Kept]) -> None:
    """Raise a ValueError unless the model can be cut to this.

    The first block keeps its attention: caches of keys and values tell their length by it.
    """
    if len(blocks) != len(anatomy.blocks):
        raise ValueError(
            f"Expected `blocks` for the {len(anatomy.blocks)} blocks of the model, got {len(blocks)}."
        )
    for block, kept in zip(anatomy.blocks, blocks, strict=True):
        check_block(block, kept)


def check_block(block: Block, kept: Kept) -> None:
    """Raise a ValueError unless the block can be cut to this."""
    fewest = 1 if block.index == 0 else 0
    if not fewest <= kept.kv_groups <= block.n_kv_heads:
        raise ValueError(
            f"Expected `kv_groups` from {fewest} to {block.n_kv_heads}, got {kept.kv_groups} at {block.name}."
        )
    if not 0 <= kept.ffn <= block.ffn_width:
        raise ValueError(f"Expected `ffn` from 0 to {block.ffn_width}, got {kept.ffn} at {block.name}.")
