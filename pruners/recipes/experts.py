"""Recipes that remove routed experts of mixtures: choice of the kept ones, and merging of the others into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.pruners.experts.evidence import ExpertEvidence
from secateur.pruners.experts.levels import chosen_experts, finite_scores
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.layout import MixtureLayout
from secateur.pruners.models.live_experts import LiveExperts
from secateur.pruners.recipes.allocation.allocate import removed
from secateur.pruners.recipes.allocation.layers import Floats, Layer
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan, key_of
from secateur.spaces.architecture.candidate import KeptUnits
from secateur.spaces.architecture.cost import cost
from secateur.spaces.methods import EXPERT_REPAIRS, has_scores

KEPT = "kept"
"""Name of the numbers of the kept experts beside the weights that change."""


@dataclass(frozen=True)
class ExpertPlan(PruningPlan):
    """Plan that removes routed experts.

    Args:
        context: of the recipe.
        sample: its calibration windows.
        repair: a row of `EXPERT_REPAIRS`.
        chosen: numbers of the experts that the metric keeps, by the block's index; blocks that lose some alone.
    """

    context: RecipeContext
    sample: Sample
    repair: str
    chosen: Mapping[int, tuple[int, ...]]

    def change(self, live: LiveBlock) -> None:
        merged = dict(self._merged(live.block.index))
        experts = live.sublayers["experts"]
        assert isinstance(experts, LiveExperts)
        experts.cut(merged.pop(KEPT).tolist(), merged)

    @property
    def units(self) -> Sequence[KeptUnits]:
        found = []
        for index, kept in enumerate(self.kept):
            experts = self._merged(index)[KEPT].tolist() if index in self.chosen else range(kept.ffn)
            found.append(KeptUnits(tuple(range(kept.kv_groups)), tuple(experts)))
        return found

    def _merged(self, block: int) -> Mapping[str, Tensor]:
        """Numbers of the kept experts, and weights that change, by their names among the experts."""
        return self.context.made.get((self.keys[block], block), partial(self._merge, block))

    def _merge(self, block: int) -> Mapping[str, Tensor]:
        evidence = self.sample.statistics.experts(block)
        kept, weights = EXPERT_REPAIRS[self.repair].function(evidence, self.chosen[block])
        return {KEPT: torch.tensor(kept), **weights}


def check_mixtures(anatomy: Anatomy) -> None:
    """Raise a ValueError unless a block of the model has a mixture of experts that can be cut."""
    if not any(block.mixture for block in anatomy.blocks):
        raise ValueError(
            f"Expected a model with a mixture of experts for a recipe of experts, got {anatomy.family} without one. "
            "Take a recipe of weights, structure or blocks."
        )


def plan_experts(context: RecipeContext, config: Mapping[str, Any]) -> ExpertPlan:
    """Plan of a recipe of unit ``experts``. The live model must be dense; it is not changed.

    The sparsity is the share of the parameters of all routed experts, with their rows of the router. A router that is
    limited to groups of experts loses as many of each group.

    Raises:
        ValueError: if it can't be carried out: a model without a mixture, too few calibration windows, a rule that
            does not reach the sparsity, scores that are not finite.
    """
    check_mixtures(context.anatomy)
    sample, metric = context.sample(config["calibration"]), config["metric"]["name"]
    layouts = {
        layout.block.index: layout.mlp for layout in context.layouts if isinstance(layout.mlp, MixtureLayout)
    }
    evidence = {index: sample.statistics.experts(index) for index in layouts}
    layers = [
        _layer(index, layout, _scores(metric, evidence[index]), context) for index, layout in layouts.items()
    ]
    gone = removed(config, layers, context, sample)
    chosen, numbers = dict[int, tuple[int, ...]](), dict[int, int]()
    for (index, layout), n_rows in zip(layouts.items(), gone, strict=True):
        numbers[index] = layout.n_units - n_rows * layout.mixture.n_groups
        if n_rows:
            chosen[index] = _chosen(context, sample, index, metric, evidence[index], numbers[index])
    kept = tuple(
        block.whole._replace(ffn=numbers.get(block.index, block.ffn_units))
        for block in context.anatomy.blocks
    )
    merging = (config["repair"], sample.sha256) if config["repair"] != "none" else ()
    keys = tuple(
        key_of(chosen[block.index], *merging) if block.index in chosen else DENSE
        for block in context.anatomy.blocks
    )
    lost = sum(layer.removed(n) for layer, n in zip(layers, gone, strict=True))
    costs = cost(context.shape, kept) | {"sparsity": lost / sum(layer.n_weights for layer in layers)}
    return ExpertPlan(keys, costs, kept, context, sample, config["repair"], chosen)


def _scores(metric: str, evidence: ExpertEvidence) -> Floats:
    """Scores of units of one expert of each group: sums over the experts of one rank in their groups."""
    if not has_scores(metric):
        return np.zeros(0)
    groups = finite_scores(metric, evidence).reshape(evidence.mixture.n_groups, -1)
    found: Floats = groups.sort(dim=1).values.sum(0).double().cpu().numpy()
    return found


def _layer(block: int, layout: MixtureLayout, scores: Floats, context: RecipeContext) -> Layer:
    mixture = layout.mixture
    names = tuple(x.name for x in context.anatomy.blocks[block].linears if x.expert is not None)
    n_rows = mixture.n_experts // mixture.n_groups
    fewest = -(-mixture.fewest // mixture.n_groups)
    return Layer(
        block,
        "mlp",
        size=layout.unit_params * mixture.n_groups,
        n_units=n_rows,
        scores=scores,
        keep=fewest if context.protected.isdisjoint(names) else n_rows,
        linears=names,
    )


def _chosen(
    context: RecipeContext,
    sample: Sample,
    block: int,
    metric: str,
    evidence: ExpertEvidence,
    n_kept: int,
) -> tuple[int, ...]:
    """The experts that stay; computed once for a metric, some windows and a number."""

    def choose() -> dict[str, Tensor]:
        return {KEPT: torch.tensor(chosen_experts(metric, evidence, [n_kept])[n_kept])}

    return tuple(context.made.get((metric, sample.sha256, block, n_kept), choose)[KEPT].tolist())
