"""Recipes that zero weights in place: numbers of zeros of each projection, and the pruned weights of a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from secateur.pruners.blockwise import BlockwisePruning
from secateur.pruners.calibration.stream import most
from secateur.pruners.models.anatomy import Block, Linear
from secateur.pruners.models.mapped import NotStreamedError
from secateur.pruners.recipes.allocation.allocate import removed
from secateur.pruners.recipes.allocation.layers import Layer, kind_of
from secateur.pruners.recipes.allocation.owl import outlier_shares
from secateur.pruners.recipes.checks import check_pattern
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.metric import ranking_of
from secateur.pruners.recipes.model_reconstruction import ModelReconstruction
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan
from secateur.pruners.recipes.schedule import of_the_rest
from secateur.pruners.recipes.weight_pruning import (
    BlockReconstruction,
    LayerReconstruction,
    MaskPruning,
    WeightPruning,
)
from secateur.pruners.recipes.weights_in_rounds import weights_in_rounds
from secateur.pruners.stores.recent import Recent
from secateur.pruners.weights.method import Method
from secateur.spaces.levels import n_zeros
from secateur.spaces.methods import BLOCK_RECONSTRUCTIONS, MODEL_RECONSTRUCTIONS, RULES
from secateur.spaces.recipe.form import OWN_THRESHOLD

SCORES = 1 << 16
"""So many scores of a projection, evenly spread, stand for all of them where thresholds are set."""


@dataclass(frozen=True)
class WeightPlan(PruningPlan):
    """Plan that zeros weights.

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
        return _shares(self.pruning.context, self.counts)


def plan_weights(context: RecipeContext, config: Mapping[str, Any]) -> WeightPlan:
    """Plan of a recipe of unit ``weights``. The live model must be dense; it is not changed.

    Raises:
        ValueError: if it can't be carried out: too few calibration windows, a rule that does not reach the
            sparsity, scores that rank nothing.
    """
    check_pattern(config["metric"], _free(context))
    sample = context.sample(config["calibration"])
    if "schedule" in config:
        return _plan(context, *_in_rounds(context, sample, config), everywhere=True)
    pruning = _prepared(context, sample, config)
    if isinstance(pruning, ModelReconstruction) and config["allocation"]["rule"] == OWN_THRESHOLD:
        return _plan(context, pruning, pruning.spread(config["sparsity"]))
    return _plan(context, pruning, _counts(context, sample, pruning, config))


def _prepared(context: RecipeContext, sample: Sample, config: Mapping[str, Any]) -> WeightPruning:
    """Pruning by the recipe's metric, with the statistics that it and the rule need."""
    pruning = _weight_pruning(context, sample, config)
    rule = RULES[config["allocation"]["rule"]]
    needs = most(pruning.needs, rule.inputs, "moments" if "outliers" in rule.evidence else "nothing")
    sample.statistics.prepare(inputs=needs, gradients=pruning.gradients)
    return pruning


def _in_rounds(
    context: RecipeContext, sample: Sample, config: Mapping[str, Any]
) -> tuple[WeightPruning, Mapping[str, int]]:
    """Weights and zeros of a recipe with a schedule."""
    return weights_in_rounds(
        context,
        sample,
        config,
        lambda here, now: _prepared(here, now, config),
        lambda here, now, pruning, share, gone: _counts(
            here, now, pruning, {**config, "sparsity": share}, gone
        ),
    )


def weights_by_block(context: RecipeContext, config: Mapping[str, Any]) -> BlockwisePruning:
    """Pruning by a recipe of unit ``weights`` that needs one block at a time, with the weights that the plan has.

    Raises:
        NotStreamedError: if it needs more: shares from scores or statistics of all blocks, gradients, a reconstruction
            of the model or of whole blocks, rounds, biases that the model's class does not have.
        ValueError: as `plan_weights` does.
    """
    if "schedule" in config:
        raise NotStreamedError(
            "Expected a recipe without `schedule`, whose rounds need the whole model, got one."
        )
    context = replace(context, made=Recent(0))  # nothing is kept beyond its block
    sample = context.sample(config["calibration"])
    pruning, rule = _weight_pruning(context, sample, config), RULES[config["allocation"]["rule"]]
    if rule.inputs != "nothing" or set(rule.evidence) - {"profile"}:
        raise NotStreamedError(f"Expected shares that follow from no weights, got the rule {rule.name}.")
    if pruning.gradients or not isinstance(pruning, MaskPruning | LayerReconstruction):
        raise NotStreamedError(
            f"Expected a metric or a reconstruction of single layers, got {config['metric']['name']}, which needs more."
        )
    counts = _counts(context, sample, pruning, config)
    if pruning.n_biases(counts):
        raise NotStreamedError(f"Expected a repair that adds no biases, got {config['repair']}.")

    def prune(block: Block, statistics: dict[str, Tensor]) -> None:
        if statistics:
            sample.statistics.use_walked(block.index, statistics, gram=pruning.needs == "gram")
        LiveBlock(block).use(pruning.pieces(block, block.name, counts))
        if statistics:  # nor while the next block is computed, or the model is measured
            sample.statistics.use_walked(block.index, {}, gram=pruning.needs == "gram")
        context.made.clear()

    shares = _shares(context, counts) if config["sparsity"] else {}
    return BlockwisePruning(sample.tokens, pruning.needs, shares, prune)


def _counts(
    context: RecipeContext,
    sample: Sample,
    pruning: WeightPruning,
    config: Mapping[str, Any],
    gone: Mapping[str, int] | None = None,
) -> Mapping[str, int]:
    """Zeros of each projection by the recipe's rule, over those that it has already, `gone`."""
    if size := config["metric"].get("group_size"):
        in_group, free = n_zeros(config["sparsity"], size), {linear.name for linear in _free(context)}
        return {x.name: in_group * x.n_weights // size * (x.name in free) for x in context.anatomy.linears}
    linears, evidence = list(context.anatomy.linears), RULES[config["allocation"]["rule"]].evidence
    before = [0 if gone is None else gone[linear.name] for linear in linears]
    dense = [
        Layer(linear.block, kind_of(linear.sublayer), size=1, n_units=linear.n_weights) for linear in linears
    ]
    layers = [
        replace(
            layer,
            n_units=max(1, layer.n_units - n),  # one that is kept, if none is left
            scores=pruning.some_scores(linear, SCORES) if "scores" in evidence else np.zeros(0),
            keep=layer.n_units - n if linear.name in context.protected else int(n == layer.n_units),
            name=linear.name,
        )
        for layer, linear, n in zip(dense, linears, before, strict=True)
    ]

    def outliers() -> tuple[float, ...]:
        return outlier_shares(context.anatomy, sample.statistics, float(config["allocation"]["factor"]))

    rest = {**config, "sparsity": of_the_rest(config["sparsity"], dense, layers)}
    further = removed(rest, layers, context, sample, outliers=outliers)
    return {x.name: n + more for x, n, more in zip(linears, before, further, strict=True)}


def _free(context: RecipeContext) -> list[Linear]:
    """Projections that are not protected."""
    return [linear for linear in context.anatomy.linears if linear.name not in context.protected]


def _shares(context: RecipeContext, counts: Mapping[str, int]) -> dict[str, float]:
    return {linear.name: counts[linear.name] / linear.n_weights for linear in context.anatomy.linears}


def _plan(
    context: RecipeContext, pruning: WeightPruning, counts: Mapping[str, int], *, everywhere: bool = False
) -> WeightPlan:
    """The plan with these zeros; `everywhere`: blocks without any are changed, too."""
    linears, blocks = list(context.anatomy.linears), context.anatomy.blocks
    keys = tuple(
        pruning.key(block, counts)
        if everywhere or any(counts[linear.name] for linear in block.linears)
        else DENSE
        for block in blocks
    )
    n_biases = pruning.n_biases(counts)
    costs = context.shape.with_zeros(sum(counts.values()), sum(linear.n_weights for linear in linears))
    costs["params"] += n_biases
    costs["size_bytes"] += n_biases * context.shape.bytes_per_param
    return WeightPlan(keys, costs, tuple(block.whole for block in blocks), pruning, counts)


def _weight_pruning(context: RecipeContext, sample: Sample, config: Mapping[str, Any]) -> WeightPruning:
    metric = config["metric"]
    if metric["name"] in MODEL_RECONSTRUCTIONS:
        return ModelReconstruction(context, sample, metric["name"])
    if metric["name"] in BLOCK_RECONSTRUCTIONS:
        return BlockReconstruction(context, sample, metric["name"])
    ranking = ranking_of(metric, dampening=context.dampening, seed=context.seed)
    if isinstance(ranking, Method) and ranking.updates_weights:
        return LayerReconstruction(context, sample, ranking)
    return MaskPruning(context, sample, ranking, config["repair"], group_size=metric.get("group_size"))
