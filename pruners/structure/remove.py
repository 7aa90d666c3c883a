"""Remove structure from a live model for good: one pass, block by block, as for an export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.gradients import model_statistics
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import BlockStatistics, stream_blocks
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.cutting import LiveSublayer
from secateur.pruners.models.lay_out import lay_out
from secateur.pruners.models.layout import SublayerLayout, check_kept
from secateur.pruners.structure.reorder import Leading, Recipe, reorder
from secateur.spaces.architecture.candidate import Kept, KeptUnits


@torch.no_grad()
def prune_structure(
    anatomy: Anatomy,
    blocks: Sequence[Kept],
    *,
    importance: str,
    repair: str,
    damp: float = 0.01,
    tokens: Int[Tensor, "windows length"],
    sequential: bool,
    on_block: Callable[[int], None] = lambda index: None,
) -> tuple[KeptUnits, ...]:
    """Cut the live model; afterwards its parameters are contiguous tensors of their own, of the smaller shapes.

    Parameters of a sub-layer that goes whole are empty. Memory beyond the model: the hidden states of the
    calibration tokens, and one block's statistics and tensors.

    Args:
        anatomy: the dense model. Its description of heads and widths stays that of the dense model.
        blocks: what each block keeps.
        importance: a row of `importance.IMPORTANCES`.
        repair: a row of `refit.REPAIRS`.
        damp: see `reorder.Recipe`.
        tokens: calibration windows.
        sequential: statistics of a block come from already pruned blocks; otherwise from the dense model, as in a
            store. Gradients are the dense model's either way.
        on_block: told the index of each block that is done.

    Returns:
        For each block the units that stayed, by their numbers in the dense model.

    Raises:
        ValueError: on an unknown name, blocks that don't fit, or a model that can't be cut (see `probe.lay_out`).
    """
    recipe = Recipe(importance, (repair,), damp)
    check_kept(anatomy, blocks)
    layouts = lay_out(anatomy)
    whole = model_statistics(anatomy, tokens, gradients=recipe.gradients)
    units = []
    detail: Literal["nothing", "moments", "gram"] = "gram" if "gram" in recipe.needs else "moments"
    if not recipe.needs_inputs:
        detail = "nothing"
    parts = stream_blocks(anatomy, tokens, outputs=detail, sequential=sequential)
    for part, layout, kept in zip(parts, layouts, blocks, strict=True):
        groups = _cut_for_good(layout.attention, kept.kv_groups, part, whole, recipe)
        channels = _cut_for_good(layout.mlp, kept.ffn, part, whole, recipe)
        units.append(KeptUnits(groups, channels))
        on_block(layout.block.index)
    return tuple(units)


def _cut_for_good(
    layout: SublayerLayout, n_kept: int, part: BlockStatistics, whole: ModelStatistics, recipe: Recipe
) -> tuple[int, ...]:
    """Cut a sub-layer, and let go of what was cut off; the numbers of the units that stay."""
    if n_kept == layout.n_units:
        return tuple(range(n_kept))
    live = LiveSublayer(layout)
    chosen: tuple[int, ...] = ()
    if n_kept == 0:
        live.remove()
    else:
        inputs = part.outputs.get(layout.output.name)
        leading = Leading(layout, reorder(layout, inputs, whole.gradients, (n_kept,), recipe))
        (repair,) = recipe.repairs
        live.cut(n_kept, leading.pieces(n_kept, repair))
        chosen = leading.order[:n_kept]
    for module in layout.modules:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return chosen
