"""Candidates of the space `masks`: the kept KV groups and FFN channels of each block, as bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class BlockMask(NamedTuple):
    """Kept units of a block; bit i of a number is set if unit i is kept.

    Args:
        kv_groups: KV heads, each with the query heads that read it.
        channels: runs of neighbouring channels of the MLP, of equal length.
    """

    kv_groups: int
    channels: int


@dataclass(frozen=True)
class UnitMasks:
    """Kept units of each block.

    Its text lists the blocks in order, the bits of KV groups and of runs of channels in hexadecimal:
    ``masks:7/ff0f,5/fff0``.
    """

    blocks: tuple[BlockMask, ...]

    @cached_property
    def text(self) -> str:
        return "masks:" + ",".join(f"{groups:x}/{channels:x}" for groups, channels in self.blocks)

    @classmethod
    def parse(cls, text: str) -> UnitMasks:
        """Masks with this canonical text.

        Raises:
            ValueError: if it is not the text of masks.
        """
        kind, _, body = text.partition(":")
        found = [re.fullmatch(r"([\da-f]+)/([\da-f]+)", block, re.ASCII) for block in body.split(",")]
        if kind == "masks" and all(found):
            masks = cls(tuple(BlockMask(int(x[1], 16), int(x[2], 16)) for x in found if x))
            if masks.text == text:
                return masks
        raise ValueError(f"Expected masks such as 'masks:7/ff0f,5/fff0', got {text[:80]!r}.")
