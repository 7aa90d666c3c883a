"""Recipes that leave zeros: how many weights of each projection go, and what becomes of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.pruners.recipes.allocating import Needs, most, removed, rule_needs
from secateur.pruners.recipes.allocation.layers import Layer
from secateur.pruners.recipes.allocation.owl import outlier_shares
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.costs import zero_costs
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan
from secateur.pruners.recipes.scores import BlendRanking, blend_of, method_of
from secateur.pruners.recipes.weight_pruning import (
    BlockReconstruction,
    LayerReconstruction,
    MaskPruning,
    WeightPruning,
)
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.methods import BLOCK_RECONSTRUCTIONS

SCORES = 1 << 16
"""So many scores of a projection, evenly spread, stand for all of them where thresholds are set."""


@dataclass(frozen=True)
class WeightPlan(PruningPlan):
    """Zeros in place.

    Args:
        pruning: makes the weights.
        counts: zeros of each projection by its full name.
    """

    pruning: WeightPruning
    counts: Mapping[str, int]

    def change(self, live: LiveBlock) -> None:
        live.use(self.pruning.pieces(live.block, self.keys[live.block.index], self.counts))

    @property
    def sparsity(self) -> Mapping[str, float]:
        linears = self.pruning.context.anatomy.linears
        return {linear.name: self.counts[linear.name] / linear.n_weights for linear in linears}

    @property
    def kept(self) -> Sequence[Kept]:
        return [Kept(block.n_kv_heads, block.ffn_width) for block in self.pruning.context.anatomy.blocks]


def plan_weights(context: RecipeContext, config: Mapping[str, Any]) -> WeightPlan:
    """What a recipe of unit ``weights`` comes to. The live model is dense, and stays so.

    Raises:
        ValueError: if it can't be carried out: too few calibration windows, a rule that does not reach the
            sparsity, scores that rank nothing.
    """
    sample = context.sample(config["calibration"])
    pruning = _weight_pruning(context, sample, config)
    needs = rule_needs(config)
    of_rule: Needs = "moments" if "outliers" in needs else "nothing"
    sample.statistics.prepare(inputs=most(pruning.needs, of_rule), gradients=pruning.gradients)
    linears = list(context.anatomy.linears)
    layers = [
        Layer(
            linear.block,
            linear.sublayer,
            size=1,
            n_units=linear.n_weights,
            scores=pruning.some_scores(linear, SCORES) if "scores" in needs else np.zeros(0),
            keep=linear.n_weights if linear.name in context.protected else 0,
            name=linear.name,
        )
        for linear in linears
    ]
    gone = removed(
        config,
        layers,
        context,
        sample,
        outliers=lambda: outlier_shares(
            context.anatomy, sample.statistics, float(config["allocation"]["factor"])
        ),
    )
    counts = {linear.name: n for linear, n in zip(linears, gone, strict=True)}
    blocks = context.anatomy.blocks
    keys = [
        pruning.key(block, counts) if any(counts[linear.name] for linear in block.linears) else DENSE
        for block in blocks
    ]
    n_weights = sum(linear.n_weights for linear in linears)
    costs = zero_costs(context.shape, sum(gone), n_weights, pruning.n_biases(counts))
    return WeightPlan(tuple(keys), costs, pruning, counts)


def _weight_pruning(context: RecipeContext, sample: Sample, config: Mapping[str, Any]) -> WeightPruning:
    """How weights are made."""
    blend = blend_of(config["metric"])
    if blend is not None:
        return MaskPruning(context, sample, BlendRanking(blend), config["repair"])
    if config["metric"]["name"] in BLOCK_RECONSTRUCTIONS:
        return BlockReconstruction(context, sample, config["metric"]["name"])
    method = method_of(config["metric"], damp=context.damp, seed=context.seed)
    return (
        LayerReconstruction(context, sample, method)
        if method.updates_weights
        else MaskPruning(context, sample, method, config["repair"])
    )
