"""Recipes that drop whole blocks: which of them, and what the others take over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from secateur.pruners.depth.merge_targets import Fitting, Run, point_block, runs_of
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.costs import cut_costs
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan, key_of
from secateur.spaces.architecture.candidate import Kept, KeptUnits
from secateur.spaces.methods import DEPTH, DEPTH_REPAIRS

GONE = "gone"


@dataclass(frozen=True)
class BlockPlan(PruningPlan):
    """Blocks that are really gone.

    Args:
        context: of the recipe.
        dropped: which.
        merged: new parameters of merge targets, by their names within the block.
    """

    context: RecipeContext
    dropped: frozenset[int]
    merged: Mapping[int, Mapping[str, Tensor]]

    def change(self, live: LiveBlock) -> None:
        if live.block.index in self.dropped:
            for part in live.layout.sublayers:
                live.remove(part.kind)
        else:
            point_block(live.block, self.merged[live.block.index])

    @property
    def kept(self) -> Sequence[Kept]:
        return [Kept(len(units.kv_groups), len(units.channels)) for units in self.units]

    @property
    def units(self) -> Sequence[KeptUnits]:
        gone = KeptUnits((), ())
        return [
            gone
            if block.index in self.dropped
            else KeptUnits(tuple(range(block.n_kv_heads)), tuple(range(block.ffn_width)))
            for block in self.context.anatomy.blocks
        ]


def plan_blocks(context: RecipeContext, config: Mapping[str, Any]) -> BlockPlan:
    """What a recipe of unit ``blocks`` comes to. The live model is dense, and stays so.

    Raises:
        ValueError: if it can't be carried out: too few calibration windows, or a sparsity that no number of blocks
            comes near to.
    """
    sample = context.sample(config["calibration"])
    dropped = _lowest(context, _scores(context, sample, config["metric"]["name"]), config["sparsity"])
    runs, repair = runs_of(dropped, len(context.anatomy.blocks)), config["repair"]
    fitting = Fitting(seed=context.seed)
    merged: dict[int, Mapping[str, Tensor]] = {}
    keys = [DENSE] * len(context.anatomy.blocks)
    for run in runs if repair != "none" else ():
        key = keys[run.target] = key_of(repair, run.dropped, sample.sha256, fitting)
        merged[run.target] = context.made.get(
            (run.target, key), partial(_repaired, context, sample, run, repair, fitting)
        )
    for index in dropped:
        keys[index] = GONE
    kept = [
        Kept(0, 0) if index in dropped else Kept(block.n_kv_groups, block.ffn_width)
        for index, block in enumerate(context.shape.blocks)
    ]
    return BlockPlan(tuple(keys), cut_costs(context.shape, kept), context, frozenset(dropped), merged)


def _repaired(
    context: RecipeContext, sample: Sample, run: Run, repair: str, fitting: Fitting
) -> dict[str, Tensor]:
    """Parameters of a run's merge target, by their names within the block."""
    found: dict[str, Tensor] = DEPTH_REPAIRS[repair].function(context.anatomy, [run], sample.tokens, fitting)[
        run.target
    ]
    return found


def _scores(context: RecipeContext, sample: Sample, name: str) -> tuple[float, ...]:
    """Of each block, higher = keep."""
    row = DEPTH[name]
    whole = sample.statistics.whole
    influence = sample.statistics.influence if "influence" in row.evidence else ()
    return context.of_blocks(
        name,
        sample,
        lambda: row.function(
            context.anatomy, sample.tokens, replace(whole(row.gradients), influence=influence)
        ),
    )


def _lowest(context: RecipeContext, scores: Sequence[float], sparsity: float) -> list[int]:
    """The blocks that score least, as many as come nearest to the sparsity; the first block stays.

    Raises:
        ValueError: if none comes near.
    """
    sizes = [shape.params(shape.n_kv_groups, shape.ffn_width) for shape in context.shape.blocks]
    protected = {linear.block for linear in context.anatomy.linears if linear.name in context.protected}
    free = [index for index in range(1, len(sizes)) if index not in protected]
    dropped: list[int] = []
    missing = sparsity * sum(sizes)
    for index in sorted(free, key=lambda index: scores[index]):
        if abs(missing - sizes[index]) >= missing:
            break
        dropped.append(index)
        missing -= sizes[index]
    if not dropped or missing > max(sizes) / 2:
        shares = [min(sizes) / sum(sizes), sum(sizes[index] for index in free) / sum(sizes)]
        raise ValueError(
            f"Expected a sparsity that whole blocks come near to, between {shares[0]:.4f} and {shares[1]:.4f}, got "
            f"{sparsity}. Choose another, or protect less."
        )
    return sorted(dropped)
