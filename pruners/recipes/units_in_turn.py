"""Units that stay where whole sub-layers go one after the other, mixtures of experts among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from secateur.pruners.calibration.stream import most
from secateur.pruners.models.layout import MixtureLayout, SublayerLayout
from secateur.pruners.recipes.allocation.allocate import removed
from secateur.pruners.recipes.allocation.layers import Layer
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.metric import Importance
from secateur.pruners.recipes.unit_layers import evidence_of, layer_of, stays_of
from secateur.pruners.structure.kprune import KeptNumbers
from secateur.spaces.methods import CUT_REPAIRS


def numbers_in_turn(
    context: RecipeContext, sample: Sample, config: Mapping[str, Any], row: Importance, repair: str
) -> tuple[KeptNumbers, ...]:
    """Kept units of each block, by a rule that removes whole sub-layers, see `sublayers.in_turn`.

    A mixture is one unit: router, routed and shared experts stay or go together. What goes in part is an attention or
    an MLP.
    """
    needs = most(row.needs, CUT_REPAIRS[repair].inputs)
    sample.statistics.prepare(outputs=needs, gradients=row.gradients)
    scores = {one.layout.name: row.function(one) for one in evidence_of(context, sample, row, needs)}
    layers = [
        _mixture(layout.block.index, part, context)
        if isinstance(part, MixtureLayout)
        else layer_of(part, scores[part.name], context, whole=True)
        for layout in context.layouts
        for part in layout.parts
    ]
    gone = iter(removed(config, layers, context, sample))
    return tuple(
        {part.kind: _stays(part, scores, next(gone)) for part in layout.parts} for layout in context.layouts
    )


def _stays(part: SublayerLayout | MixtureLayout, scores: Mapping[str, Tensor], gone: int) -> tuple[int, ...]:
    units = range(part.n_units)
    if isinstance(part, MixtureLayout):
        return () if gone else tuple(units)
    return stays_of(part, scores[part.name], units, gone, whole=True)


def _mixture(block: int, part: MixtureLayout, context: RecipeContext) -> Layer:
    """Layer of a whole mixture, which is one unit."""
    linears = tuple(x.name for x in context.anatomy.blocks[block].linears if x.sublayer == "experts")
    return Layer(
        block,
        "mlp",
        size=part.n_units * part.unit_params + part.fixed_params,
        n_units=1,
        scores=np.zeros(1),
        keep=int(not context.protected.isdisjoint(linears)),
        linears=linears,
    )
