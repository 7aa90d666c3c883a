"""Structural pruning for good: numbers of kept units to a smaller live model, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.gradients import model_statistics
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import BlockStatistics, stream_blocks
from secateur.pruners.experts.channels import channels_of, experts_cut
from secateur.pruners.experts.levels import expert_levels
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.check_kept import check_kept, check_splits
from secateur.pruners.models.cutting import LiveSublayer, pass_through
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import MixtureLayout, SublayerLayout
from secateur.pruners.models.live_experts import LiveExperts
from secateur.pruners.pruner import OnBlock, no_report
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.reorder import Count, ImportanceOrdered, reorder_by
from secateur.spaces.architecture.candidate import Kept, KeptUnits


@torch.no_grad()
def prune_structure(
    anatomy: Anatomy,
    blocks: Sequence[Kept],
    *,
    importance: str,
    repair: str,
    dampening: float = 0.01,
    experts: str = "reap",
    tokens: Int[Tensor, "windows length"],
    contrast: Int[Tensor, "others _"] | None = None,
    sequential: bool,
    on_block: OnBlock = no_report,
) -> tuple[KeptUnits, ...]:
    """Cut the live model; afterwards its parameters are contiguous tensors of their own, of the smaller shapes.

    Parameters of a sub-layer that is removed whole are empty. Memory beyond the model: the hidden states of the
    calibration tokens, and one block's statistics and tensors.

    Args:
        anatomy: the dense model. Its description of heads and widths is not changed.
        blocks: numbers of kept units of each block.
        importance: name of an importance of structure.
        repair: name of a repair of output projections.
        dampening: see `StructureMethod`.
        experts: name of an importance of experts.
        tokens: calibration windows.
        contrast: windows of the second calibration set, for importances that need one.
        sequential: statistics of a block come from already pruned blocks; otherwise from the dense model, as in a
            store. Gradients are the dense model's either way.
        on_block: told the index of each block that is done.

    Returns:
        Kept units of each block, by their numbers in the dense model.

    Raises:
        ValueError: on an unknown name, blocks that don't fit, or a model that can't be cut (see `find_layouts`).
    """
    mixed = any(block.mixture for block in anatomy.blocks)
    splits = any(kept.queries for kept in blocks)
    method = StructureMethod(importance, (repair,), dampening, experts if mixed else "", heads=splits)
    check_kept(anatomy, blocks)
    layouts = find_layouts(anatomy, experts=True)
    check_splits(layouts, blocks)
    whole = model_statistics(anatomy, tokens, gradients=method.gradients, contrast=contrast)
    units = []
    channels = any(kept.channels or kept.shared for kept in blocks)
    parts = stream_blocks(
        anatomy,
        tokens,
        outputs=method.needs,
        experts=mixed,
        expert_outputs=channels,
        sequential=sequential,
    )
    for part, layout, kept in zip(parts, layouts, blocks, strict=True):
        groups, inside, queries = tuple[int, ...](), tuple[int, ...](), tuple[int, ...]()
        if layout.attention is not None:
            attention = (kept.kv_groups, kept.queries)
            groups, queries = _cut_for_good(layout.attention, attention, part, whole, method)
        if isinstance(layout.mlp, MixtureLayout):
            inside = _cut_experts(layout.mlp, kept, part, whole, method)
        elif layout.mlp is not None:
            inside, _ = _cut_for_good(layout.mlp, (kept.ffn, 0), part, whole, method)
        if not any(kept.units) and not layout.vanishes:
            pass_through(layout.block.module)
        units.append(KeptUnits(groups, inside, queries))
        on_block(layout.block.index)
    return tuple(units)


def _cut_experts(
    layout: MixtureLayout,
    kept: Kept,
    part: BlockStatistics,
    whole: ModelStatistics,
    method: StructureMethod,
) -> tuple[int, ...]:
    """Cut a mixture, free the memory of the removed experts, and return the numbers of the kept ones."""
    if kept.ffn == layout.n_units and not (kept.channels or kept.shared):
        return tuple(range(kept.ffn))
    live = LiveExperts(layout)
    experts: tuple[int, ...] = ()
    if kept.ffn == 0:
        live.remove()
    else:
        assert part.experts is not None, "collected where blocks have mixtures"
        repair = method.of_experts[-1]
        tensors: dict[str, Tensor] = {}
        if kept.ffn < layout.n_units:
            tensors |= expert_levels(layout, method.experts, part.experts, {repair: (kept.ffn,)})
        if kept.channels or kept.shared:
            tensors |= channels_of(layout, part, whole.gradients, method, (kept.shared,))
        experts, weights, shared = experts_cut(layout, tensors, kept, method.repairs[-1])
        live.cut(experts, weights, shared)
        live.empty_others()
    for parameter in (p for module in layout.modules for p in module.parameters(recurse=False)):
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return experts


def _cut_for_good(
    layout: SublayerLayout,
    count: Count,
    part: BlockStatistics,
    whole: ModelStatistics,
    method: StructureMethod,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut a sub-layer, free the memory of the removed part, and return the numbers of the kept units.

    Likewise those of the kept query heads, where some of each group go.
    """
    n_kept, queries = count
    if n_kept == layout.n_units and not queries:
        return tuple(range(n_kept)), ()
    live = LiveSublayer(layout)
    chosen: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    if n_kept == 0:
        live.remove()
    else:
        inputs = part.outputs.get(layout.output.name)
        ordered = ImportanceOrdered(layout, reorder_by(method, layout, inputs, whole.gradients, (count,)))
        (repair,) = method.repairs
        live.cut(n_kept, ordered.pieces(n_kept, repair, queries), queries)
        chosen = ordered.order[:n_kept]
        if queries:
            size = layout.heads_per_group
            heads = tuple(group * size + x for group in chosen for x in ordered.heads[group][:queries])
    for module in layout.modules:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return chosen, heads
