"""A block's weights with their units ordered by importance, so that a level is a leading part of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import OutputStatistics
from secateur.pruners.models.cutting import Piece
from secateur.pruners.models.layout import Placement, SublayerLayout
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.method import StructureMethod, importance_order
from secateur.pruners.structure.refit import RepairInputs
from secateur.spaces.methods import CUT_REPAIRS


def reorder(
    layout: SublayerLayout,
    order: Int[Tensor, " units"],
    inputs: OutputStatistics | None,
    counts: Sequence[int],
    repairs: Sequence[str],
    dampening: float,
) -> dict[str, Tensor]:
    """Weights of a sub-layer with their units in this order, and repairs, by names that `ImportanceOrdered` reads.

    Args:
        layout: of the live, dense sub-layer.
        order: the numbers of all units, the kept ones of each level first.
        inputs: statistics, if a repair needs them.
        counts: levels to repair, as numbers of kept units; those of none and of all need no repair.
        repairs: rows of `CUT_REPAIRS`.
        dampening: of repairs, see `StructureMethod`.
    """
    tensors = {_order_name(layout): order}
    for placement in layout.placements:
        linear, index = placement.linear, placement.index(order)
        tensors[f"{linear.name}.weight"] = linear.weight.index_select(placement.axis, index)
        if linear.bias is not None:
            tensors[f"{linear.name}.bias"] = linear.bias if placement.axis == 1 else linear.bias[index]
    counts = [count for count in counts if 0 < count < layout.n_units]
    rows = {name: CUT_REPAIRS[name] for name in repairs if CUT_REPAIRS[name].gives != "nothing"}
    if not rows or not counts:
        return tensors
    assert inputs is not None, "the caller collects what a repair needs"
    index, output = layout.placements[-1].index(order), layout.output
    gram = any(row.needs == "gram" for row in rows.values())
    moment = inputs.second_moment[index][:, index] if gram else None
    given = RepairInputs(tensors[f"{output.name}.weight"], inputs.mean[index], moment, dampening, output.name)
    for name, row in rows.items():
        results = row.function(given, [count * layout.unit_width for count in counts])
        for count, result in zip(counts, results, strict=True):
            tensors[_repair_name(layout, name, count)] = result.to(output.weight.dtype)
    return tensors


def reorder_by(
    method: StructureMethod,
    layout: SublayerLayout,
    inputs: OutputStatistics | None,
    gradients: Mapping[Kind, Mapping[str, Float[Tensor, "..."]]],
    counts: Sequence[int],
) -> dict[str, Tensor]:
    """`reorder` by the importance and with the repairs of a method, from the statistics that it needs."""
    order = importance_order(method.importance, Evidence(layout, inputs, gradients, method.dampening))
    return reorder(layout, order, inputs, counts, method.of_sublayers, method.dampening)


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
    tensors = reorder(layout, order, inputs, (len(kept),), (repair,), dampening)
    return ImportanceOrdered(layout, tensors).pieces(len(kept), repair)


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

    def pieces(self, n_kept: int, repair: str) -> dict[str, Piece]:
        """Weight and bias of each cut projection: views, except where projections are fused contiguously.

        Args:
            n_kept: units, > 0 and not all of them.
            repair: one that was prepared for this level.

        Raises:
            ValueError: if it was not.
        """
        found = {x.linear.name: self._piece(x, n_kept) for x in self.layout.placements}
        gives = CUT_REPAIRS[repair].gives if repair in CUT_REPAIRS else "nothing"  # a repair of experts
        if gives == "nothing":
            return found
        name, repaired = self.layout.output.name, self._repair(repair, n_kept)
        changes = {
            "weight": (repaired, None),
            "bias": (None, repaired),
            "both": (repaired[..., :-1], repaired[..., -1]),
        }
        return found | {name: found[name].changed(*changes[gives])}

    def _piece(self, placement: Placement, n_kept: int) -> Piece:
        name, n_units = placement.linear.name, self.layout.n_units
        bias = self._tensors.get(f"{name}.bias")
        if bias is not None and placement.axis == 0:
            bias = placement.first(bias, n_kept, n_units)
        return Piece(placement.first(self._tensors[f"{name}.weight"], n_kept, n_units), bias)

    def _repair(self, repair: str, n_kept: int) -> Tensor:
        try:
            return self._tensors[_repair_name(self.layout, repair, n_kept)]
        except KeyError as error:
            raise ValueError(
                f"Expected a level whose repair {repair!r} was prepared, got {n_kept} of {self.layout.n_units} units "
                f"[at {self.layout.name}]. Add it to the levels."
            ) from error


def _order_name(layout: SublayerLayout) -> str:
    return f"{layout.output.name}.order"


def _repair_name(layout: SublayerLayout, repair: str, n_kept: int) -> str:
    return f"{layout.output.name}.{repair}.{n_kept}"
