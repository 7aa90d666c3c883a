"""Units of a recipe that trains in rounds: its projections, the columns that stay, repairs, and the final cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from secateur.pruners.models.anatomy import Linear, Sublayer
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.schedule import columns_of, whole_numbers
from secateur.pruners.structure.kprune import KeptNumbers
from secateur.pruners.structure.reorder import cut_pieces, cut_weights
from secateur.spaces.methods import CUT_REPAIRS

Numbers = Sequence[KeptNumbers]


def numbers_of(layouts: Sequence[BlockLayout], facts: Mapping[str, Tensor]) -> tuple[KeptNumbers, ...]:
    """Kept units of each block as `facts_of` wrote them; all of them if it did not."""
    whole = whole_numbers(layouts)
    if not facts:
        return whole
    return tuple(
        {kind: tuple(facts[_name(index, kind)].tolist()) for kind in kept} for index, kept in enumerate(whole)
    )


def facts_of(numbers: Numbers) -> dict[str, Tensor]:
    """Kept units of each block as tensors."""
    return {
        _name(index, kind): torch.tensor(units, dtype=torch.int64)
        for index, kept in enumerate(numbers)
        for kind, units in kept.items()
    }


def _name(index: int, kind: Sublayer) -> str:
    return f"kept {index} {kind}"


def _parts(layouts: Sequence[BlockLayout], numbers: Numbers) -> list[tuple[SublayerLayout, tuple[int, ...]]]:
    """Sub-layers with the units that they keep, those that keep some."""
    return [
        (part, kept[part.kind])
        for layout, kept in zip(layouts, numbers, strict=True)
        for part in layout.sublayers
        if kept[part.kind]
    ]


def linears_of(layouts: Sequence[BlockLayout], numbers: Numbers) -> list[Linear]:
    """Projections of the sub-layers that are left."""
    return [x.linear for part, _ in _parts(layouts, numbers) for x in part.placements]


def columns(layouts: Sequence[BlockLayout], numbers: Numbers) -> dict[str, Bool[Tensor, " inputs"]]:
    """True at the columns that stay, of output projections; what leads to the others has no gradient."""
    found = {
        part.output.name: columns_of(part, kept[part.kind])
        for layout, kept in zip(layouts, numbers, strict=True)
        for part in layout.sublayers
    }
    return {name: stays for name, stays in found.items() if not stays.all()}


def repaired_outputs(
    context: RecipeContext, sample: Sample, numbers: Numbers, before: Numbers, repair: str
) -> dict[str, Tensor]:
    """Output projections in dense shapes, repaired for the units that go in this round.

    Args:
        sample: with statistics of the live model, which has the units of `before`.
    """
    needs, found = CUT_REPAIRS[repair].needs, dict[str, Tensor]()
    if repair == "none":
        return found
    for layout, kept, had in zip(context.layouts, numbers, before, strict=True):
        for part in layout.sublayers:
            units, output = kept[part.kind], part.output
            if not units or len(units) == len(had[part.kind]):
                continue
            gram = needs == "gram"
            inputs = sample.statistics.outputs(layout.block.index, gram=gram)[output.name]
            piece = cut_pieces(part, units, inputs, repair, context.dampening)[output.name]
            weight = torch.zeros_like(output.weight)
            weight[:, columns_of(part, units)] = piece.weight
            found[output.name] = weight
    return found


def cut_trained(
    layouts: Sequence[BlockLayout], numbers: Numbers, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of the kept units, by full name, of projections that were trained."""
    found: dict[str, Tensor] = {}
    for part, units in _parts(layouts, numbers):
        found |= cut_weights(part, units, weights)
    return found
