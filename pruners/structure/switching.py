"""How an architecture turns into a model: each block cut, by reference, to what it keeps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.structure.store import StructureStore
from secateur.pruners.structure.surgery import Surgeon
from secateur.spaces.architecture.candidate import Kept, read_kept

Key = tuple[Kept, str]
"""What a block keeps, and how that is repaired."""


class StructureSwitcher:
    """Switches blocks to what they keep of the dense one.

    Args:
        anatomy: the live, dense model.
        store: its structure store.
    """

    def __init__(self, anatomy: Anatomy, store: StructureStore) -> None:
        self._surgeon = Surgeon(anatomy, store)
        self._blocks = anatomy.blocks
        self._dense = tuple((Kept(block.n_kv_heads, block.ffn_width), "none") for block in anatomy.blocks)
        self._now: list[Key] = list(self._dense)

    def keys(self, config: Mapping[str, Any]) -> Sequence[Hashable]:
        """Pairs of what a block keeps and its repair; where nothing is left to repair, ``none``."""
        repair = config["repair"]
        return [
            (kept, repair if _repairable(block, kept) else "none")
            for block, kept in zip(self._blocks, read_kept(config), strict=True)
        ]

    def apply(self, block: int, key: Hashable) -> None:
        """Cut the block, if it is not what the key says."""
        if self._now[block] != key:
            assert isinstance(key, tuple)
            kept, repair = key
            self._surgeon.cut(block, kept, repair)
            self._now[block] = key

    def restore(self) -> None:
        """The dense model again, with the same tensors."""
        self._surgeon.restore()
        self._now = list(self._dense)


def _repairable(block: Block, kept: Kept) -> bool:
    """Whether a sub-layer lost a part: one that is whole, or gone, has nothing to make up for."""
    return 0 < kept.kv_groups < block.n_kv_heads or 0 < kept.ffn < block.ffn_width
