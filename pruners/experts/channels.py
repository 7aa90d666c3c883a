"""Channels within experts: their order in each routed expert, and the weights of a mixture cut to some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import OutputStatistics
from secateur.pruners.calibration.stream import BlockStatistics
from secateur.pruners.experts.levels import expert_level
from secateur.pruners.models.cutting import Piece
from secateur.pruners.models.layout import MixtureLayout, SublayerLayout
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.reorder import ImportanceOrdered, reorder, reorder_by
from secateur.spaces.architecture.candidate import Kept


def channels_of(
    layout: MixtureLayout,
    part: BlockStatistics,
    gradients: Mapping[Kind, Mapping[str, Tensor]],
    method: StructureMethod,
    shared: Sequence[int],
) -> dict[str, Tensor]:
    """Weights of routed and shared experts with their channels in the order of the importance.

    Args:
        shared: numbers of kept channels of shared experts that repairs are made for.
    """
    found = ordered_channels(layout, part.outputs, gradients, method)
    if layout.shared is not None:
        seen = part.outputs[layout.shared.output.name]
        found |= reorder_by(method, layout.shared, seen, gradients, [(n, 0) for n in shared])
    return found


def experts_cut(
    layout: MixtureLayout, tensors: Mapping[str, Tensor], kept: Kept, repair: str
) -> tuple[tuple[int, ...], Mapping[str, Tensor], tuple[int, Mapping[str, Piece]] | None]:
    """Arguments of `LiveExperts.cut` for a mixture that loses channels, and perhaps experts."""
    experts, weights = tuple(range(layout.n_units)), dict[str, Tensor]()
    if kept.ffn < layout.n_units:
        experts, weights = expert_level(layout, tensors, kept.ffn, repair)
    if kept.channels:
        weights = cut_channels(layout, tensors, experts, weights, kept.channels)
    if not kept.shared or layout.shared is None or kept.shared == layout.shared.n_units:
        return experts, weights, None
    return (
        experts,
        weights,
        (kept.shared, ImportanceOrdered(layout.shared, tensors).pieces(kept.shared, repair)),
    )


def ordered_channels(
    layout: MixtureLayout,
    outputs: Mapping[str, OutputStatistics],
    gradients: Mapping[Kind, Mapping[str, Tensor]],
    method: StructureMethod,
) -> dict[str, Tensor]:
    """Weights of the routed experts with their channels in the order of the importance, as `reorder` names them.

    Channels of experts that no token is routed to are ordered by the norms of their columns of down. Repairs are for
    sub-layers alone: kept channels of routed experts are as they were.
    """
    found: dict[str, Tensor] = {}
    for expert in layout.routed:
        seen = outputs.get(expert.output.name)
        if seen is None or not seen.n_tokens:
            order = expert.output.weight.float().norm(dim=0).argsort(stable=True).flip(0)
            found |= reorder(expert, order, None, (), (), method.dampening)
        else:
            found |= reorder_by(method, expert, seen, gradients, ())
    return found


def cut_channels(
    layout: MixtureLayout,
    tensors: Mapping[str, Tensor],
    kept: Sequence[int],
    merged: Mapping[str, Tensor],
    n_channels: int,
) -> dict[str, Tensor]:
    """Weights of the kept experts with their most important channels, by their names among the experts.

    Args:
        layout: of the mixture, whole.
        tensors: as `ordered_channels` made them.
        kept: numbers of the experts that stay.
        merged: weights of some of them into which others were merged.
        n_channels: of each.
    """
    found: dict[str, Tensor] = {}
    for index in kept:
        expert = layout.routed[index]
        ordered = ImportanceOrdered(expert, tensors)
        if any(name.startswith(f"{index}.") for name in merged):
            found |= _of_merged(expert, index, ordered.order[:n_channels], merged)
            continue
        for placement in expert.placements:
            found |= _named(placement.linear.name, index, ordered.pieces(n_channels, "none"))
    return found


def _of_merged(
    expert: SublayerLayout, index: int, order: Sequence[int], merged: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    found = {}
    for placement in expert.placements:
        own = placement.linear.name.rpartition(".")[2]
        for name, axis in (("weight", placement.axis), ("bias", 0)):
            value = merged.get(f"{index}.{own}.{name}")
            if value is not None:
                cut = name == "weight" or placement.axis == 0
                columns = torch.tensor(order, device=value.device)
                found[f"{index}.{own}.{name}"] = value.index_select(axis, columns) if cut else value
    return found


def _named(linear: str, index: int, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    stem, piece = f"{index}.{linear.rpartition('.')[2]}", pieces[linear]
    return {f"{stem}.weight": piece.weight} | ({} if piece.bias is None else {f"{stem}.bias": piece.bias})
