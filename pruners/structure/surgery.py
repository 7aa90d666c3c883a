"""Cut blocks of a live model by reference, and make it dense again."""

from __future__ import annotations

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.cutting import LiveSublayer
from secateur.pruners.models.layout import check_block
from secateur.pruners.structure.reorder import Leading
from secateur.pruners.structure.store import StructureStore
from secateur.spaces.architecture.candidate import Kept


class Surgeon:
    """Switches blocks of a live model between levels; between calls the model runs as any other.

    Weights are pointed to, not copied: to views of the store's files, except where projections are fused
    contiguously (Phi3, GPT-2), whose parts are joined. Levels are not written to. A sub-layer of which all units
    stay is the dense one itself. One that goes whole gives zeros, its norms do nothing, and in a cache of keys and
    values it takes one number a token.

    Args:
        anatomy: the dense model.
        store: built for it.
    """

    def __init__(self, anatomy: Anatomy, store: StructureStore) -> None:
        self._blocks = anatomy.blocks
        self._live = [
            {
                part.kind: (LiveSublayer(part), store.leading(layout.block.index, part.kind))
                for part in layout.sublayers
            }
            for layout in store.layouts
        ]

    def cut(self, block: int, kept: Kept, repair: str = "none") -> None:
        """Make a block what is kept of the dense one.

        Args:
            block: its index.
            kept: how much stays. Block 0 keeps a KV group.
            repair: one that the store was built for; at its levels.

        Raises:
            ValueError: if the block can't be cut so, or the store lacks the repair at this level.
        """
        check_block(self._blocks[block], kept)
        attention, mlp = self._live[block]["attention"], self._live[block]["mlp"]
        _cut(*attention, kept.kv_groups, repair)
        _cut(*mlp, kept.ffn, repair)

    def restore(self) -> None:
        """The dense model again: the same tensors in the same parameters."""
        for block in self._live:
            for live, _ in block.values():
                live.restore()


def _cut(live: LiveSublayer, leading: Leading, n_kept: int, repair: str) -> None:
    """Cut one sub-layer to its most important units."""
    if n_kept == leading.layout.n_units:
        live.restore()
    elif n_kept == 0:
        live.remove()
    else:
        live.cut(n_kept, leading.pieces(n_kept, repair))
