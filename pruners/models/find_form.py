"""Form of the fused projections of a sub-layer, found by cutting it and comparing what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.models.anatomy import Block, Sublayer
from secateur.pruners.models.cutting import LiveSublayer, Piece
from secateur.pruners.models.find_sublayer import Cuttable, sublayer_of
from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.models.observed import Seen, observe
from secateur.pruners.models.placement import ALL, FORMS
from secateur.pruners.models.runner import BlockInputs, BlockRunner


def find_form(
    runner: BlockRunner, block: Block, kind: Sublayer, inputs: BlockInputs, dense: Seen
) -> Cuttable:
    """The first form under which a cut block computes the values of the dense one.

    None: of what can only be kept or removed as a whole.
    """
    if kind == "recurrent" or (kind == "attention" and not block.n_kv_heads):
        return Cuttable(None)
    for form in FORMS:
        layout = sublayer_of(block, kind, Cuttable(form), dense)
        if layout.n_units == 1 or same_without_first(runner, block, layout, inputs, dense):
            several = kind == "attention" and layout.heads_per_group > 1
            return Cuttable(form, several and _same_without_queries(runner, block, layout, inputs, dense))
    return Cuttable(None)


def same_without_first(
    runner: BlockRunner, block: Block, layout: SublayerLayout, inputs: BlockInputs, dense: Seen
) -> bool:
    """True if the units from the last to the second, in this order, compute the same as in the dense block."""
    backwards = torch.arange(layout.n_units - 1, -1, -1, device=layout.output.weight.device)
    columns = layout.placements[-1].index(backwards)[: -layout.unit_width]
    pieces = _ordered(layout, backwards, None, layout.n_units - 1, ALL)
    return _same_inputs(runner, block, layout, inputs, dense, (layout.n_units - 1, pieces, 0), columns)


def _same_without_queries(
    runner: BlockRunner, block: Block, layout: SublayerLayout, inputs: BlockInputs, dense: Seen
) -> bool:
    """Likewise if the query heads of each KV group stand in reversed order, without the first one."""
    n_units, n_kept, device = layout.n_units, layout.heads_per_group - 1, layout.output.weight.device
    order, share = torch.arange(n_units, device=device), layout.share_of(n_kept)
    heads = torch.arange(n_kept, -1, -1, device=device).expand(n_units, -1)
    output = layout.placements[-1]
    columns = output.first(output.index(order, heads), n_units, n_units, share)
    pieces = _ordered(layout, order, heads, n_units, share)
    return _same_inputs(runner, block, layout, inputs, dense, (n_units, pieces, n_kept), columns)


def _same_inputs(
    runner: BlockRunner,
    block: Block,
    layout: SublayerLayout,
    inputs: BlockInputs,
    dense: Seen,
    cut: tuple[int, Mapping[str, Piece], int],
    columns: Int[Tensor, " kept"],
) -> bool:
    """True if the cut block gives its output projection the values of these columns in the dense one."""
    live = LiveSublayer(layout)
    try:
        live.cut(*cut)
        seen = observe(runner, block, inputs)
    except (RuntimeError, ValueError, TypeError):  # shapes that don't fit: another form, or another family
        return False
    finally:
        live.restore()
    module = layout.output.module
    wanted, got = dense.inputs[module][..., columns], seen.inputs[module]
    tolerance = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    return got.shape == wanted.shape and torch.allclose(got, wanted, rtol=0.0, atol=tolerance)


def _ordered(
    layout: SublayerLayout,
    order: Int[Tensor, " units"],
    heads: Int[Tensor, "units heads"] | None,
    n_kept: int,
    share: Fraction,
) -> dict[str, Piece]:
    """The live weights with their units, and the query heads in them, in this order: the first of them."""
    n_units, pieces = layout.n_units, {}
    for placement in (*layout.placements, *layout.vectors):
        index = placement.index(order, heads)
        bias = placement.linear.bias
        if bias is not None and placement.axis == 0:
            bias = placement.first(bias[index], n_kept, n_units, share)
        weight = placement.linear.weight.index_select(placement.axis, index)
        pieces[placement.linear.name] = Piece(placement.first(weight, n_kept, n_units, share), bias)
    return pieces
