"""Weights of recipes that are zeroed in rounds: scored again on what is left, and trained within the mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from secateur.pruners.models.anatomy import Block
from secateur.pruners.models.cutting import Piece
from secateur.pruners.recipes.context import MADE_BYTES, RecipeContext, Sample
from secateur.pruners.recipes.plan import key_of
from secateur.pruners.recipes.retraining import Retraining
from secateur.pruners.recipes.weight_pruning import Counts, MaskPruning, WeightPruning
from secateur.pruners.stores.recent import Recent

_COUNTS = "counts"

NewPruning = Callable[[RecipeContext, Sample], WeightPruning]
"""Pruning of the live model by a recipe's metric, with the statistics that it needs collected."""

NewCounts = Callable[[RecipeContext, Sample, WeightPruning, float, Counts], Counts]
"""Zeros of each projection at a share, those that it has already among them."""


@dataclass(frozen=True)
class HeldWeights(WeightPruning):
    """Weights that were made in rounds.

    Args:
        weights: by full name; those that differ from the dense ones.
        name: of all that they depend on.
    """

    weights: Mapping[str, Tensor]
    name: str

    def key(self, block: Block, counts: Counts) -> str:
        return key_of(self.name, block.index)

    def pieces(self, block: Block, key: str, counts: Counts) -> Mapping[str, Piece]:
        return {x.name: Piece(self.weights[x.name], x.bias) for x in block.linears if x.name in self.weights}


def weights_in_rounds(
    context: RecipeContext,
    sample: Sample,
    config: Mapping[str, Any],
    new_pruning: NewPruning,
    new_counts: NewCounts,
) -> tuple[HeldWeights, Counts]:
    """Weights after all rounds of a recipe, and the zeros of each projection; the live model is left dense.

    In each round the live model is scored anew, and loses more of its weights; those that went score least. A metric
    that reconstructs layers begins from the round's weights, and may change which ones are zero.

    Raises:
        ValueError: as a pruning at once does; `DivergedError` if the training diverges.
    """
    linears = list(context.anatomy.linears)
    rounds = Retraining(context, sample, config)
    rounds.begin(linears)
    counts = {x.name: 0 for x in linears}
    if _COUNTS in rounds.facts:
        counts = dict(zip(counts, rounds.facts[_COUNTS].tolist(), strict=True))
    for share in rounds.left:
        with rounds.live():
            now = rounds.seen(sample)
            here = replace(context, made=Recent(MADE_BYTES))  # keys don't tell the rounds apart
            gone = {x.name: x.weight == 0 for x in linears if counts[x.name]}
            pruning = new_pruning(here, now)
            if isinstance(pruning, MaskPruning):
                pruning = replace(pruning, gone=gone)
            counts = dict(new_counts(here, now, pruning, share, counts))
            pieces: dict[str, Piece] = {}
            for block in context.anatomy.blocks:
                pieces |= pruning.pieces(block, pruning.key(block, counts), counts)
            masks = {name: piece.weight != 0 for name, piece in pieces.items()}
            if rounds.penalty:
                rounds.train(linears, _kept(gone), masks)
                now_live = {x.name: rounds.weights.get(x.name, x.weight) for x in linears}
                rounds.weights |= {name: now_live[name] * kept for name, kept in masks.items()}
            else:
                rounds.weights |= {name: piece.weight for name, piece in pieces.items()}
        if not rounds.penalty:
            with rounds.live():
                rounds.train(linears, masks)
        rounds.end_round({_COUNTS: torch.tensor([counts[x.name] for x in linears])})
    with rounds.live():
        rounds.finish(linears, {x.name: x.weight != 0 for x in linears if counts[x.name]})
    return HeldWeights(context, sample, rounds.weights, rounds.name), counts


def _kept(gone: Mapping[str, Bool[Tensor, "out in"]]) -> dict[str, Bool[Tensor, "out in"]]:
    return {name: ~zeros for name, zeros in gone.items()}
