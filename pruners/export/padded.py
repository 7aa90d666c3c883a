"""Dense shapes with zeros in place of removed units, for the parent's class and config."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.stock import NotStockError, fit
from secateur.pruners.models.anatomy import HeadVector
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.placement import ALL, Placement

# Fused projections that join q, k and v head by head; the others join all q, all k, all v.
_INTERLEAVED = ("query_key_value",)


def padded_model(cut: CutModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The dense config's content and weights of the dense shapes: the kept units first, then zeros.

    A head of zeros has values of zero, a channel of zeros is multiplied by zero: the logits are those of the cut
    model. Nothing is smaller or faster.

    Raises:
        NotStockError: if the class has no place for a bias that a repair added.
    """
    if cut.narrow is not None:
        raise NotStockError("it has fewer hidden channels")
    live = dict(cut.anatomy.model.named_parameters())
    weights = {name: parameter.detach() for name, parameter in live.items() if parameter.numel()}
    fused = any(linear.name.endswith(_INTERLEAVED) for linear in cut.anatomy.linears)
    for placement, n_kept, n_units, share in cut.placements("interleaved" if fused else "contiguous"):
        _pad_linear(weights, placement, n_kept, n_units, share)
    for name, parameter in cut.skeleton(cut.config).named_parameters():
        weights.setdefault(name, torch.zeros(parameter.shape, dtype=cut.anatomy.head.weight.dtype))
    return fit(cut, cut.config.to_dict(), weights)


def check_padded(cut: CutModel) -> None:
    """Raise a ValueError if a block is removed that would still do something with zeros in it; the model is dense."""
    if all(any(kept.units) for kept in cut.kept):
        return
    for layout, kept in zip(find_layouts(cut.anatomy, experts=True), cut.kept, strict=True):
        if not layout.vanishes and not any(kept.units):
            raise ValueError(
                f"Expected blocks that do nothing once their weights are zeros for hf-padded, got {layout.block.name}, "
                f"which norms the stream itself. Use the format hf."
            )


def _pad_linear(
    weights: dict[str, Tensor], placement: Placement, n_kept: int, n_units: int, share: Fraction
) -> None:
    """Put the padded weight and bias of a projection in place of the cut ones, unless it is removed."""
    linear = placement.linear
    if linear.parameter not in weights:
        return
    padded = pad(linear.weight, placement, n_kept, n_units, share)
    padded = padded.T if linear.transposed else padded
    weights[linear.parameter] = padded.reshape(-1) if isinstance(linear, HeadVector) else padded
    bias = weights.get(f"{linear.name}.bias")
    if bias is not None and placement.axis == 0:
        weights[f"{linear.name}.bias"] = pad(bias, placement, n_kept, n_units, share)


def pad(cut: Tensor, placement: Placement, n_kept: int, n_units: int, share: Fraction = ALL) -> Tensor:
    """Inverse of `Placement.first`, with zeros for the units and query heads that are gone."""
    axis = min(placement.axis, cut.ndim - 1)
    queries = int(placement.queries * share)
    sizes = [placement.parts[0] - placement.queries + queries, *placement.parts[1:]]
    starts = [n_kept * before for before in (0, *accumulate(sizes))]
    pieces = []
    for start, width, size in zip(starts, sizes, placement.parts, strict=False):
        piece = cut.narrow(axis, start, n_kept * width)
        if width < size:
            by_unit = piece.unflatten(axis, (n_kept, width))
            missing = list(by_unit.shape)
            missing[axis + 1] = size - width
            parts = by_unit.split([queries, width - queries], axis + 1)
            piece = torch.cat([parts[0], by_unit.new_zeros(missing), parts[1]], axis + 1).flatten(
                axis, axis + 1
            )
        gone = list(piece.shape)
        gone[axis] = (n_units - n_kept) * size
        pieces += [piece, piece.new_zeros(gone)]
    return torch.cat(pieces, axis)
