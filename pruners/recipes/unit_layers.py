"""Sub-layers as layers of allocation rules: their evidence, their units, and those that stay."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.recipes.allocation.layers import Floats, Layer, kind_of
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.metric import Importance
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.flap import standardised_flap
from secateur.spaces.method import Detail


def evidence_of(context: RecipeContext, sample: Sample, row: Importance, needs: Detail) -> list[Evidence]:
    """Evidence of attention and MLP, or shared experts, of each block."""
    gradients = sample.statistics.gradients(row.gradients)
    found = []
    for layout in context.layouts:
        index = layout.block.index
        seen = {} if needs == "nothing" else sample.statistics.outputs(index, gram=needs == "gram")
        found += [
            Evidence(part, seen.get(part.output.name), gradients, context.dampening)
            for part in layout.sublayers
        ]
    return found


def flap_of(evidence: Evidence) -> Floats:
    """FLAP's standardised scores of the units; one of what is kept or removed as a whole."""
    found: Floats = standardised_flap(evidence).double().cpu().numpy()
    return found.mean(keepdims=True) if evidence.layout.rigid else found


def layer_of(
    layout: SublayerLayout, score: Float[Tensor, " units"], context: RecipeContext, *, whole: bool = False
) -> Layer:
    """Layer of a sub-layer.

    One that can't be cut has a single unit, which goes only where whole sub-layers do; so has an attention there that
    a recurrent mixer is parallel to, and elsewhere it keeps a group. Shared experts keep a channel.

    Args:
        whole: the rule removes whole sub-layers.
    """
    names = tuple(placement.linear.name for placement in layout.placements)
    n_units, scores = layout.n_units, score.double().cpu().numpy()
    if _is_one(layout, whole=whole):
        n_units, scores = 1, scores.mean(keepdims=True)
    least = layout.output.sublayer == "experts" or ((layout.rigid or bool(layout.parallel)) and not whole)
    return Layer(
        layout.output.block,
        kind_of(layout.kind),
        size=layout.unit_params * (layout.n_units // n_units),
        n_units=n_units,
        scores=scores,
        keep=int(least) if context.protected.isdisjoint(names) else n_units,
        rest=layout.fixed_params,
        linears=names,
    )


def _is_one(layout: SublayerLayout, *, whole: bool) -> bool:
    """True if a sub-layer is kept or removed as a whole."""
    return layout.rigid or (bool(layout.parallel) and whole)


def stays_of(
    layout: SublayerLayout,
    score: Float[Tensor, " units"],
    units: Sequence[int],
    gone: int,
    *,
    whole: bool = False,
) -> tuple[int, ...]:
    """Numbers of the units that stay without so many; all or none where it can't be cut."""
    if _is_one(layout, whole=whole):
        return () if gone else tuple(units)
    return _highest(score, units, len(units) - gone)


def _highest(score: Float[Tensor, " units"], units: Sequence[int], n_kept: int) -> tuple[int, ...]:
    """Numbers of the units with the highest scores, ascending; of equal scores the larger numbers are kept."""
    order = score[list(units)].argsort(stable=True).flip(0)[:n_kept]
    return tuple(sorted(units[place] for place in order.tolist()))
