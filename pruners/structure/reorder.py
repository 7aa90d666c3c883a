"""A block's weights with their units ordered by importance, so that a level is a leading part of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import OutputStatistics
from secateur.pruners.models.cutting import Piece
from secateur.pruners.models.layout import BlockLayout, Placement, SublayerLayout
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.importance import check_importance, importance_order
from secateur.pruners.structure.refit import Needs, RepairInputs
from secateur.spaces.methods import CUT_REPAIRS, IMPORTANCES
from secateur.spaces.names import nearest


@dataclass(frozen=True)
class Recipe:
    """How units are ordered and what repairs what stays.

    Args:
        importance: a row of `IMPORTANCES`.
        repairs: rows of `CUT_REPAIRS` to prepare.
        damp: of `obs_order` and of repairs, as a fraction of the second moment's mean diagonal, > 0.

    Raises:
        ValueError: on an unknown name, or damp out of range.
    """

    importance: str
    repairs: tuple[str, ...] = ("none",)
    damp: float = 0.01

    def __post_init__(self) -> None:
        check_importance(self.importance)
        for repair in self.repairs:
            if repair not in CUT_REPAIRS:
                raise ValueError(f"Expected a known `repair`, got {repair!r}.{nearest(repair, CUT_REPAIRS)}")
        if not self.damp > 0:
            raise ValueError(f"Expected `damp` > 0, got {self.damp}.")

    @property
    def needs(self) -> frozenset[Needs]:
        """Statistics of inputs that must be collected."""
        return frozenset(
            (IMPORTANCES[self.importance].inputs, *(CUT_REPAIRS[name].inputs for name in self.repairs))
        )

    @property
    def gradients(self) -> tuple[Kind, ...]:
        """Kinds of gradients that must be collected."""
        return IMPORTANCES[self.importance].gradients

    @property
    def needs_inputs(self) -> bool:
        """True if it needs statistics of the output projections' inputs."""
        return bool(self.needs & {"moments", "gram"})


def reorder(
    layout: SublayerLayout,
    inputs: OutputStatistics | None,
    gradients: Mapping[Kind, Mapping[str, Float[Tensor, "..."]]],
    counts: Sequence[int],
    recipe: Recipe,
) -> dict[str, Tensor]:
    """What a sub-layer's levels are made of, by names as `ImportanceOrdered` reads them.

    Args:
        layout: of the live, dense sub-layer.
        inputs: statistics, if the recipe needs them.
        gradients: likewise.
        counts: levels to repair, as units that stay; those of nothing and of all need none.
        recipe: how.
    """
    order = importance_order(recipe.importance, Evidence(layout, inputs, gradients, recipe.damp))
    return in_order(layout, order, inputs, counts, recipe.repairs, recipe.damp)


def in_order(
    layout: SublayerLayout,
    order: Int[Tensor, " units"],
    inputs: OutputStatistics | None,
    counts: Sequence[int],
    repairs: Sequence[str],
    damp: float,
) -> dict[str, Tensor]:
    """`reorder` for an order that is known.

    Args:
        layout: of the live, dense sub-layer.
        order: the numbers of all units, those that stay at each level first.
        inputs: statistics, if a repair needs them.
        counts: levels to repair.
        repairs: rows of `CUT_REPAIRS`.
        damp: of repairs, see `Recipe`.
    """
    tensors = {_order_name(layout): order}
    for placement in layout.placements:
        linear, index = placement.linear, placement.index(order)
        tensors[f"{linear.name}.weight"] = linear.weight.index_select(placement.axis, index)
        if linear.bias is not None:
            tensors[f"{linear.name}.bias"] = linear.bias if placement.axis == 1 else linear.bias[index]
    return tensors | dict(_repaired(layout, inputs, order, counts, repairs, damp))


def _repaired(
    layout: SublayerLayout,
    inputs: OutputStatistics | None,
    order: Int[Tensor, " units"],
    counts: Sequence[int],
    repairs: Sequence[str],
    damp: float,
) -> Iterator[tuple[str, Tensor]]:
    counts = [count for count in counts if 0 < count < layout.n_units]
    rows = {name: CUT_REPAIRS[name] for name in repairs if CUT_REPAIRS[name].gives != "nothing"}
    if not rows or not counts:
        return
    assert inputs is not None, "the caller collects what a repair needs"
    index = layout.placements[-1].index(order)
    gram = any(row.needs == "gram" for row in rows.values())
    given = RepairInputs(
        layout.output.weight.index_select(1, index),
        inputs.mean[index],
        inputs.second_moment[index][:, index] if gram else None,
        damp,
        layout.output.name,
    )
    for name, row in rows.items():
        results = row.function(given, [count * layout.unit_width for count in counts])
        for count, result in zip(counts, results, strict=True):
            yield _repair_name(layout, name, count), result.to(layout.output.weight.dtype)


class ImportanceOrdered:
    """The levels of a sub-layer, as leading parts of its reordered weights.

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
        """What each projection is cut to: views, except where projections are fused contiguously.

        Args:
            n_kept: units, > 0 and not all of them.
            repair: one that was prepared for this level.

        Raises:
            ValueError: if it was not.
        """
        found = {x.linear.name: self._piece(x, n_kept) for x in self.layout.placements}
        gives = CUT_REPAIRS[repair].gives
        if gives == "nothing":
            return found
        name = self.layout.output.name
        weight, bias = _parts(gives, self._repair(repair, n_kept))
        return found | {name: found[name].changed(weight, bias)}

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


def reorder_block(
    layout: BlockLayout,
    inputs: Mapping[str, OutputStatistics],
    gradients: Mapping[Kind, Mapping[str, Float[Tensor, "..."]]],
    counts: Mapping[str, Sequence[int]],
    recipe: Recipe,
) -> dict[str, Tensor]:
    """`reorder` for both sub-layers of a block; `counts` by ``attention`` and ``mlp``."""
    tensors: dict[str, Tensor] = {}
    for part in layout.sublayers:
        tensors |= reorder(part, inputs.get(part.output.name), gradients, counts[part.kind], recipe)
    return tensors


def _parts(gives: str, repaired: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A new weight and an addition to the bias, as far as a repair gives them."""
    if gives == "both":
        return repaired[:, :-1], repaired[:, -1]
    return (repaired, None) if gives == "weight" else (None, repaired)


def _order_name(layout: SublayerLayout) -> str:
    return f"{layout.output.name}.order"


def _repair_name(layout: SublayerLayout, repair: str, n_kept: int) -> str:
    return f"{layout.output.name}.{repair}.{n_kept}"
