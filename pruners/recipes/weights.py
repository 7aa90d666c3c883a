"""Recipes that leave zeros: how many weights of each projection go, and what becomes of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.pruners.recipes.allocating import Needs, most, removed, rule_needs
from secateur.pruners.recipes.allocation.layers import Layer
from secateur.pruners.recipes.allocation.owl import outlier_shares
from secateur.pruners.recipes.block_reconstruction import Together
from secateur.pruners.recipes.context import Basis, Sample
from secateur.pruners.recipes.costs import zero_costs
from secateur.pruners.recipes.live import LiveBlock
from secateur.pruners.recipes.plan import DENSE, Decision
from secateur.pruners.recipes.scores import BlendRanking, blend_of, method_of
from secateur.pruners.recipes.weight_pruning import Masking, Rebuilding, Zeroing
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.methods import BLOCK_RECONSTRUCTIONS

SCORES = 1 << 16
"""So many scores of a projection, evenly spread, stand for all of them where thresholds are set."""


@dataclass(frozen=True)
class WeightDecision(Decision):
    """Zeros in place.

    Args:
        zeroing: makes the weights.
        counts: zeros of each projection by its full name.
    """

    zeroing: Zeroing
    counts: Mapping[str, int]

    def change(self, live: LiveBlock) -> None:
        live.use(self.zeroing.pieces(live.block, self.keys[live.block.index], self.counts))

    @property
    def sparsity(self) -> Mapping[str, float]:
        linears = self.zeroing.basis.anatomy.linears
        return {linear.name: self.counts[linear.name] / linear.n_weights for linear in linears}

    @property
    def kept(self) -> Sequence[Kept]:
        return [Kept(block.n_kv_heads, block.ffn_width) for block in self.zeroing.basis.anatomy.blocks]


def decide_weights(basis: Basis, config: Mapping[str, Any]) -> WeightDecision:
    """What a recipe of unit ``weights`` comes to. The live model is dense, and stays so.

    Raises:
        ValueError: if it can't be carried out: too few calibration windows, a rule that does not reach the
            sparsity, scores that rank nothing.
    """
    sample = basis.sample(config["calibration"])
    zeroing = _zeroing(basis, sample, config)
    needs = rule_needs(config)
    of_rule: Needs = "moments" if "outliers" in needs else "nothing"
    sample.statistics.prepare(inputs=most(zeroing.needs, of_rule), gradients=zeroing.gradients)
    linears = list(basis.anatomy.linears)
    layers = [
        Layer(
            linear.block,
            linear.sublayer,
            size=1,
            n_units=linear.n_weights,
            scores=zeroing.some_scores(linear, SCORES) if "scores" in needs else np.zeros(0),
            keep=linear.n_weights if linear.name in basis.protected else 0,
            name=linear.name,
        )
        for linear in linears
    ]
    gone = removed(
        config,
        layers,
        basis,
        sample,
        outliers=lambda: outlier_shares(
            basis.anatomy, sample.statistics, float(config["allocation"]["factor"])
        ),
    )
    counts = {linear.name: n for linear, n in zip(linears, gone, strict=True)}
    blocks = basis.anatomy.blocks
    keys = [
        zeroing.key(block, counts) if any(counts[linear.name] for linear in block.linears) else DENSE
        for block in blocks
    ]
    n_weights = sum(linear.n_weights for linear in linears)
    costs = zero_costs(basis.shape, sum(gone), n_weights, zeroing.n_biases(counts))
    return WeightDecision(tuple(keys), costs, zeroing, counts)


def _zeroing(basis: Basis, sample: Sample, config: Mapping[str, Any]) -> Zeroing:
    """How weights are made."""
    blend = blend_of(config["metric"])
    if blend is not None:
        return Masking(basis, sample, BlendRanking(blend), config["repair"])
    if config["metric"]["name"] in BLOCK_RECONSTRUCTIONS:
        return Together(basis, sample, config["metric"]["name"])
    method = method_of(config["metric"], damp=basis.damp, seed=basis.seed)
    return (
        Rebuilding(basis, sample, method)
        if method.updates_weights
        else Masking(basis, sample, method, config["repair"])
    )
