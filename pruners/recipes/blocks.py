"""Recipes that drop whole blocks: choice of the blocks, and merging into the kept ones before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.depth.merge_targets import DroppedRun, Fitting, point_block, runs_of
from secateur.pruners.models.cutting import Piece
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan, key_of
from secateur.pruners.recipes.retraining import Retraining
from secateur.pruners.recipes.schedule import silenced, whole_numbers
from secateur.pruners.structure.kprune import KeptNumbers
from secateur.spaces.architecture.candidate import Kept, KeptUnits
from secateur.spaces.architecture.cost import cost
from secateur.spaces.methods import DEPTH, DEPTH_REPAIRS
from secateur.spaces.recipe.schedule import shares_of, trained_tokens

GONE = "gone"
_DROPPED = "dropped"


@dataclass(frozen=True)
class BlockPlan(PruningPlan):
    """Plan that drops blocks.

    Args:
        merged: new parameters of the merge targets, by their names within the block.
        trained: weights of projections of kept blocks, by full name.
    """

    merged: Mapping[int, Mapping[str, Tensor]]
    trained: Mapping[str, Tensor]

    def change(self, live: LiveBlock) -> None:
        index = live.block.index
        if self.keys[index] == GONE:
            live.drop()
        elif index in self.merged:
            point_block(live.block, self.merged[index])
        else:
            linears = [x for x in live.block.linears if x.name in self.trained]
            live.use({x.name: Piece(self.trained[x.name], x.bias) for x in linears})

    @property
    def units(self) -> Sequence[KeptUnits]:
        return [KeptUnits(tuple(range(kept.kv_groups)), tuple(range(kept.ffn))) for kept in self.kept]


def plan_blocks(context: RecipeContext, config: Mapping[str, Any]) -> BlockPlan:
    """Plan of a recipe of unit ``blocks``. The live model must be dense; it is not changed.

    Raises:
        ValueError: if it can't be carried out: too few calibration windows, or a sparsity that no number of blocks
            comes near to.
    """
    _lowest(
        context, list(map(float, _sizes(context))), config["sparsity"]
    )  # refuses before anything is measured or trained
    sample = context.sample(config["calibration"])
    if trained_tokens(config):
        dropped, trained, name = _trained(context, sample, config)
    else:
        dropped, trained, name = _dropped(context, sample, config), {}, ""
    blocks, repair = context.anatomy.blocks, config["repair"]
    fitting = Fitting(seed=context.seed)
    merged: dict[int, Mapping[str, Tensor]] = {}
    stays = [key_of(name, block.index) if trained else DENSE for block in blocks]
    keys = [GONE if block.index in dropped else stays[block.index] for block in blocks]
    for run in runs_of(dropped, len(blocks)) if repair != "none" else ():
        key = keys[run.target] = key_of(repair, run.dropped, sample.sha256, fitting)
        merged[run.target] = context.made.get(
            (run.target, key), partial(_merged, context, sample, run, repair, fitting)
        )
    kept = tuple(Kept(0, 0) if block.index in dropped else block.whole for block in blocks)
    return BlockPlan(tuple(keys), cost(context.shape, kept), kept, merged, trained)


def _dropped(context: RecipeContext, sample: Sample, config: Mapping[str, Any]) -> list[int]:
    """Indices of the blocks to drop, chosen round by round."""
    name, dropped, shares = config["metric"]["name"], list[int](), shares_of(config)
    if len(shares) == 1:
        return _lowest(context, _scores(context, sample, name), config["sparsity"])
    whole = whole_numbers(context.layouts)
    for share in shares:
        if not _lowest(context, [0.0] * len(whole), share, dropped, check=False):
            continue  # nothing to measure for
        numbers = _numbers(whole, dropped)
        now = context.silenced_sample(sample, numbers) if dropped else sample
        with silenced(context.layouts, numbers, dropped):
            scores = _scores(context, now, name)
        dropped += _lowest(context, scores, share, dropped, check=share == shares[-1])
    return sorted(dropped)


def _numbers(whole: Sequence[KeptNumbers], dropped: Sequence[int]) -> list[KeptNumbers]:
    """Units of each block without those of the dropped ones."""
    return [dict.fromkeys(kept, ()) if index in dropped else kept for index, kept in enumerate(whole)]


def _trained(
    context: RecipeContext, sample: Sample, config: Mapping[str, Any]
) -> tuple[list[int], Mapping[str, Tensor], str]:
    """Indices of the blocks to drop by a recipe that trains, weights of the others, and the name of both."""
    rounds, whole = Retraining(context, sample, config), whole_numbers(context.layouts)
    linears = list(context.anatomy.linears)
    rounds.begin(linears)
    dropped = rounds.facts[_DROPPED].tolist() if _DROPPED in rounds.facts else []
    for share in rounds.left:
        with rounds.live(), silenced(context.layouts, _numbers(whole, dropped), dropped):
            scores = _scores(context, rounds.seen(sample), config["metric"]["name"])
        dropped += _lowest(context, scores, share, dropped, check=share == config["sparsity"])
        linears = [x for x in linears if x.block not in dropped]
        with rounds.live(), silenced(context.layouts, _numbers(whole, dropped), dropped):
            rounds.train(linears, {})
        rounds.end_round({_DROPPED: torch.tensor(dropped, dtype=torch.int64)})
    linears = [x for x in linears if x.block not in dropped]
    with rounds.live(), silenced(context.layouts, _numbers(whole, dropped), dropped):
        rounds.finish(linears, {})
    return sorted(dropped), rounds.weights, rounds.name


def _merged(
    context: RecipeContext, sample: Sample, run: DroppedRun, repair: str, fitting: Fitting
) -> Mapping[str, Tensor]:
    """New parameters of the merge target of a run, by their names within the block."""
    repaired: Mapping[int, Mapping[str, Tensor]] = DEPTH_REPAIRS[repair].function(
        context.anatomy, [run], sample.tokens, fitting
    )
    return repaired[run.target]


def _scores(context: RecipeContext, sample: Sample, name: str) -> tuple[float, ...]:
    """Score of each block, higher = keep; computed once for a metric and some windows."""
    key = (name, sample.sha256)
    if key not in context.block_scores:
        row = DEPTH[name]
        influence = sample.statistics.influence if "influence" in row.evidence else ()
        whole = replace(sample.statistics.whole(row.gradients), influence=influence)
        context.block_scores[key] = row.function(context.anatomy, sample.tokens, whole)
    return context.block_scores[key]


def _sizes(context: RecipeContext) -> list[int]:
    """Parameters of each block."""
    return [shape.params(shape.n_kv_groups, shape.ffn_width) for shape in context.shape.blocks]


def _lowest(
    context: RecipeContext,
    scores: Sequence[float],
    sparsity: float,
    before: Sequence[int] = (),
    *,
    check: bool = True,
) -> list[int]:
    """The blocks that score least, as many as come nearest to the sparsity; the first block is kept.

    Args:
        before: blocks that are dropped already.
        check: that the sparsity is met.

    Raises:
        ValueError: if none comes near.
    """
    sizes = _sizes(context)
    protected = {linear.block for linear in context.anatomy.linears if linear.name in context.protected}
    free = [index for index in range(1, len(sizes)) if index not in {*protected, *before}]
    if check and not (free or before):
        raise ValueError(
            f"Expected a model with blocks that may go, got one of {len(sizes)}, of which the first one and protected "
            "ones stay. Take another unit, or protect less."
        )
    dropped: list[int] = []
    missing = sparsity * sum(sizes) - sum(sizes[index] for index in before)
    for index in sorted(free, key=lambda index: scores[index]):
        if abs(missing - sizes[index]) >= missing:
            break
        dropped.append(index)
        missing -= sizes[index]
    if check and (not [*before, *dropped] or missing > max(sizes) / 2):
        shares = [min(sizes) / sum(sizes), sum(sizes[index] for index in free) / sum(sizes)]
        raise ValueError(
            f"Expected a sparsity that whole blocks come near to, between {shares[0]:.4f} and {shares[1]:.4f}, got "
            f"{sparsity}. Choose another, or protect less."
        )
    return sorted(dropped)
