"""A block's weights with their units ordered by importance, so that a level is a leading part of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import OutputStatistics
from secateur.pruners.models.cutting import Piece
from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.models.placement import Placement
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.method import StructureMethod, importance_order, query_order
from secateur.pruners.structure.refit import RepairInputs
from secateur.spaces.methods import CUT_REPAIRS

Count = tuple[int, int]
"""Kept units, and query heads of each; 0: all of them."""


def reorder(
    layout: SublayerLayout,
    order: Int[Tensor, " units"],
    inputs: OutputStatistics | None,
    counts: Sequence[Count],
    repairs: Sequence[str],
    dampening: float,
    heads: Int[Tensor, "units heads"] | None = None,
) -> dict[str, Tensor]:
    """Weights of a sub-layer with their units in this order, and repairs, by names that `ImportanceOrdered` reads.

    Args:
        layout: of the live, dense sub-layer.
        order: the numbers of all units, the kept ones of each level first.
        inputs: statistics, if a repair needs them.
        counts: levels to repair; those of none and of all need no repair.
        repairs: rows of `CUT_REPAIRS`.
        dampening: of repairs, see `StructureMethod`.
        heads: order of the query heads of each KV group, by the group's number; None: as they are.
    """
    tensors = {_order_name(layout): order} | ({} if heads is None else {_heads_name(layout): heads})
    for placement in (*layout.placements, *layout.vectors):
        linear, index = placement.linear, placement.index(order, heads)
        tensors[f"{linear.name}.weight"] = linear.weight.index_select(placement.axis, index)
        if linear.bias is not None:
            tensors[f"{linear.name}.bias"] = linear.bias if placement.axis == 1 else linear.bias[index]
    counts = [(n, queries) for n, queries in counts if 0 < n < layout.n_units or (n and queries)]
    rows = {name: CUT_REPAIRS[name] for name in repairs if CUT_REPAIRS[name].gives != "nothing"}
    if not rows or not counts:
        return tensors
    assert inputs is not None, "the caller collects what a repair needs"
    index, output = layout.placements[-1].index(order, heads), layout.output
    gram = any(row.needs == "gram" for row in rows.values())
    for queries in dict.fromkeys(queries for _, queries in counts):
        alike = [count for count in counts if count[1] == queries]
        columns = index[layout.leading_queries(queries)]
        moment = inputs.second_moment[columns][:, columns] if gram else None
        weight = tensors[f"{output.name}.weight"] if not queries else output.weight[:, columns]
        given = RepairInputs(weight, inputs.mean[columns], moment, dampening, output.name)
        widths = [layout.placements[-1].size(n, layout.share_of(queries)) for n, _ in alike]
        for name, row in rows.items():
            for count, result in zip(alike, row.function(given, widths), strict=True):
                tensors[_repair_name(layout, name, count)] = result.to(output.weight.dtype)
    return tensors


def reorder_by(
    method: StructureMethod,
    layout: SublayerLayout,
    inputs: OutputStatistics | None,
    gradients: Mapping[Kind, Mapping[str, Float[Tensor, "..."]]],
    counts: Sequence[Count],
) -> dict[str, Tensor]:
    """`reorder` by the importance and with the repairs of a method, from the statistics that it needs.

    Nothing of a sub-layer that is kept or removed as a whole.
    """
    if layout.rigid:
        return {}
    evidence = Evidence(layout, inputs, gradients, method.dampening)
    order = importance_order(method.importance, evidence)
    heads = query_order(method.importance, evidence) if method.heads and layout.splits else None
    return reorder(layout, order, inputs, counts, method.of_sublayers, method.dampening, heads)


def cut_pieces(
    layout: SublayerLayout,
    kept: Sequence[int],
    inputs: OutputStatistics | None = None,
    repair: str = "none",
    dampening: float = 0.0,
) -> dict[str, Piece]:
    """Pieces of a sub-layer cut to these units, in their order, and repaired; see `reorder`."""
    rest = sorted(set(range(layout.n_units)) - set(kept))
    order = torch.tensor([*kept, *rest], device=layout.output.weight.device)
    tensors = reorder(layout, order, inputs, ((len(kept), 0),), (repair,), dampening)
    return ImportanceOrdered(layout, tensors).pieces(len(kept), repair)


def cut_weights(
    layout: SublayerLayout, kept: Sequence[int], weights: Mapping[str, Float[Tensor, "_ _"]]
) -> dict[str, Float[Tensor, "_ _"]]:
    """These weights of a sub-layer's projections, cut to some of its units; the live model is left as it was.

    Args:
        layout: of the live sub-layer, in its dense shapes.
        kept: units, in their order.
        weights: by full name, in dense shapes; of projections without, nothing is returned.
    """
    dense = [(x.linear, x.linear.weight) for x in layout.placements if x.linear.name in weights]
    try:
        for linear, _ in dense:
            linear.point_to(weights[linear.name])
        pieces = cut_pieces(layout, kept)
        return {linear.name: pieces[linear.name].weight.clone() for linear, _ in dense}
    finally:
        for linear, weight in dense:
            linear.point_to(weight)


class ImportanceOrdered:
    """Levels of a sub-layer, as leading parts of its reordered weights.

    Args:
        layout: of the sub-layer.
        tensors: as `reorder` made them.
    """

    def __init__(self, layout: SublayerLayout, tensors: Mapping[str, Tensor]) -> None:
        self.layout = layout
        self._tensors = tensors

    @property
    def order(self) -> tuple[int, ...]:
        """Numbers of the units, the most important first."""
        return tuple(self._tensors[_order_name(self.layout)].tolist())

    @property
    def heads(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the query heads of each KV group within it, the most important first; empty if not ranked."""
        name = _heads_name(self.layout)
        return tuple(map(tuple, self._tensors[name].tolist())) if name in self._tensors else ()

    def columns(self, n_kept: int, queries: int = 0) -> Int[Tensor, " kept"]:
        """Numbers of the kept columns of the output projection, in their order."""
        heads = self._tensors.get(_heads_name(self.layout))  # in their order wherever they can be cut
        placement = self.layout.placements[-1]
        index = placement.index(self._tensors[_order_name(self.layout)], heads)
        return placement.first(index, n_kept, self.layout.n_units, self.layout.share_of(queries))

    def pieces(self, n_kept: int, repair: str, queries: int = 0) -> dict[str, Piece]:
        """Weight and bias of each cut projection: views, except where query heads are cut or parts fused contiguously.

        Args:
            n_kept: units, > 0 and not all of them, unless query heads are cut.
            repair: one that was prepared for this level.
            queries: query heads of each kept KV group; 0: all.

        Raises:
            ValueError: if it was not.
        """
        share = self.layout.share_of(queries)
        places = (*self.layout.placements, *self.layout.vectors)
        found = {x.linear.name: self._piece(x, n_kept, share) for x in places}
        gives = CUT_REPAIRS[repair].gives if repair in CUT_REPAIRS else "nothing"  # a repair of experts
        if gives == "nothing":
            return found
        name, repaired = self.layout.output.name, self._repair(repair, (n_kept, queries))
        changes = {
            "weight": (repaired, None),
            "bias": (None, repaired),
            "both": (repaired[..., :-1], repaired[..., -1]),
        }
        return found | {name: found[name].changed(*changes[gives])}

    def _piece(self, placement: Placement, n_kept: int, share: Fraction) -> Piece:
        name, n_units = placement.linear.name, self.layout.n_units
        bias = self._tensors.get(f"{name}.bias")
        if bias is not None and placement.axis == 0:
            bias = placement.first(bias, n_kept, n_units, share)
        return Piece(placement.first(self._tensors[f"{name}.weight"], n_kept, n_units, share), bias)

    def _repair(self, repair: str, count: Count) -> Tensor:
        try:
            return self._tensors[_repair_name(self.layout, repair, count)]
        except KeyError as error:
            raise ValueError(
                f"Expected a level whose repair {repair!r} was prepared, got {count[0]} of {self.layout.n_units} units "
                f"[at {self.layout.name}]. Add it to the levels."
            ) from error


def _order_name(layout: SublayerLayout) -> str:
    return f"{layout.output.name}.order"


def _heads_name(layout: SublayerLayout) -> str:
    return f"{layout.output.name}.heads"


def _repair_name(layout: SublayerLayout, repair: str, count: Count) -> str:
    n_kept, queries = count
    return f"{layout.output.name}.{repair}.{n_kept}" + (f"q{queries}" if queries else "")
