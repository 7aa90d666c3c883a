"""Checks that blocks can be cut to numbers of kept units."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.layout import BlockLayout, MixtureLayout, SublayerLayout
from secateur.pruners.models.mixture import Mixture
from secateur.spaces.architecture.candidate import Kept


def check_parts(layouts: Sequence[BlockLayout], purpose: str, *, experts: bool = False) -> None:
    """Raise a ValueError unless blocks consist of one attention and one MLP, both of units that can be cut.

    Args:
        layouts: of the blocks.
        purpose: for the error.
        experts: that a mixture of experts may stand for the MLP.
    """
    for layout in layouts:
        part, reason = layout.attention, ""
        rigid = [x for x in layout.sublayers if x.rigid]
        if part is None or layout.mlp is None:
            reason = f"one mixer alone at {layout.block.name}"
        elif isinstance(layout.mlp, MixtureLayout) and not experts:
            reason = layout.mlp.name
        elif rigid:
            reason = f"{rigid[0].name}, which has no units"
        elif part.parallel:
            reason = f"{part.name}, which a recurrent mixer is parallel to"
        if reason:
            raise ValueError(
                f"Expected blocks of one attention and one MLP, both of units that can be cut, for {purpose}, got "
                f"{reason}. Take another space, metric or repair."
            )


def check_kept(anatomy: Anatomy, blocks: Sequence[Kept]) -> None:
    """Raise a ValueError unless the model can be cut to this; the first block's attention has the caches' length."""
    if len(blocks) != len(anatomy.blocks):
        raise ValueError(
            f"Expected `blocks` for the {len(anatomy.blocks)} blocks of the model, got {len(blocks)}."
        )
    for block, kept in zip(anatomy.blocks, blocks, strict=True):
        check_block(block, kept)


def check_splits(layouts: Sequence[BlockLayout], blocks: Sequence[Kept]) -> None:
    """Raise a ValueError if query heads are to be cut singly, or KV groups, where that can't be done."""
    for layout, kept in zip(layouts, blocks, strict=True):
        attention, mlp = layout.attention, layout.mlp
        if attention is not None and attention.rigid and 0 < kept.kv_groups < attention.n_units:
            raise ValueError(
                f"Expected `kv_groups` 0 or {attention.n_units} at {layout.block.name}, in which what mixes "
                f"tokens is kept or removed as a whole, got {kept.kv_groups}."
            )
        if isinstance(mlp, SublayerLayout) and mlp.rigid and 0 < kept.ffn < mlp.n_units:
            raise ValueError(
                f"Expected `ffn` 0 or {mlp.n_units} at {layout.block.name}, whose MLP is kept or removed as a whole, "
                f"got {kept.ffn}."
            )
        if kept.queries and not (attention is not None and attention.splits):
            raise ValueError(
                f"Expected query heads that can be cut singly for `queries`, got {kept.queries} at "
                f"{layout.block.name}, whose heads can't. Cut KV groups."
            )


def check_block(block: Block, kept: Kept) -> None:
    """Raise a ValueError unless the block can be cut to this."""
    fewest = min(1, block.attention_units) if block.index == 0 else 0
    if not fewest <= kept.kv_groups <= block.attention_units:
        raise ValueError(
            f"Expected `kv_groups` from {fewest} to {block.attention_units}, got {kept.kv_groups} at {block.name}."
        )
    most = block.n_heads // block.attention_units - 1 if block.attention_units else 0
    if kept.queries and not (kept.kv_groups and 0 < kept.queries <= most):
        raise ValueError(
            f"Expected `queries` from 1 to {most} beside KV groups, or none, got {kept.queries} beside "
            f"{kept.kv_groups} at {block.name}."
        )
    if block.mixture is not None:
        block.mixture.check(kept.ffn)
        _check_channels(block, block.mixture, kept)
    elif kept.channels or kept.shared:
        raise ValueError(
            f"Expected `channels` and `shared` in blocks with a mixture of experts, got {kept.channels} and "
            f"{kept.shared} at {block.name} without. Use `ffn`."
        )
    elif not 0 <= kept.ffn <= block.ffn_width:
        raise ValueError(f"Expected `ffn` from 0 to {block.ffn_width}, got {kept.ffn} at {block.name}.")


def _check_channels(block: Block, mixture: Mixture, kept: Kept) -> None:
    widest = {"channels": mixture.n_channels, "shared": block.shared_channels}
    for name, n_units in widest.items():
        n_kept = getattr(kept, name)
        if n_kept and not (kept.ffn and 0 < n_kept <= n_units):
            raise ValueError(
                f"Expected `{name}` from 1 to {n_units} beside experts, or 0, got {n_kept} beside {kept.ffn} at "
                f"{block.name}."
            )
