"""Recipes that cut KV groups and FFN channels: choice of the kept units, their weights and repairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from secateur.pruners.calibration.stream import most
from secateur.pruners.models.cutting import Piece
from secateur.pruners.models.layout import BlockLayout, MixtureLayout, SublayerLayout
from secateur.pruners.models.live_experts import LiveExperts
from secateur.pruners.models.narrow import Narrow
from secateur.pruners.models.shape import narrow_shape
from secateur.pruners.recipes.allocation.allocate import removed
from secateur.pruners.recipes.allocation.layers import Layer
from secateur.pruners.recipes.allocation.sublayers import in_turn
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.metric import Importance, importance_of
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan, key_of
from secateur.pruners.recipes.retraining import Retraining
from secateur.pruners.recipes.schedule import of_the_rest, silenced, whole_numbers
from secateur.pruners.recipes.trained_units import (
    columns,
    cut_trained,
    facts_of,
    linears_of,
    numbers_of,
    repaired_outputs,
)
from secateur.pruners.recipes.unit_layers import evidence_of, flap_of, layer_of, stays_of
from secateur.pruners.recipes.units_in_turn import numbers_in_turn
from secateur.pruners.structure.chosen import ChosenUnits
from secateur.pruners.structure.kprune import KeptNumbers
from secateur.pruners.structure.reorder import cut_pieces
from secateur.spaces.architecture.candidate import Kept, KeptUnits
from secateur.spaces.architecture.cost import cost
from secateur.spaces.methods import CUT_REPAIRS, RULES, STREAM_REPAIRS, UNIT_RECONSTRUCTIONS, check_protect
from secateur.spaces.recipe.schedule import shares_of, trained_tokens


@dataclass(frozen=True)
class UnitPlan(PruningPlan):
    """Plan that cuts units.

    Args:
        context: of the recipe.
        sample: its calibration windows.
        repair: a row of `CUT_REPAIRS`.
        numbers: of the kept units of each block, ascending.
        outputs: weights that follow the pruned stream, of output projections, or that were trained, of any, of whole
            sub-layers, too, by full names; cut.
        stream: hidden channels that stay; None: all.
    """

    context: RecipeContext
    sample: Sample
    repair: str
    numbers: tuple[KeptNumbers, ...]
    outputs: Mapping[str, Tensor]
    stream: Narrow | None = None

    def change(self, live: LiveBlock) -> None:
        index = live.block.index
        if not any(self.kept[index].units):
            live.drop()
            return
        if self.numbers[index].get("experts") == ():
            live.sublayers["experts"].remove()
        for layout in _counted(self.context.layouts[index], self.numbers[index]):
            if isinstance(layout, MixtureLayout):
                continue
            kept = self.numbers[index][layout.kind]
            sublayer = live.sublayers.get(layout.kind, live.sublayers.get("experts"))
            if isinstance(sublayer, LiveExperts):
                if len(kept) < layout.n_units or _has_any(layout, self.outputs):
                    shared = (len(kept), self._pieces(layout, index, kept))
                    sublayer.cut(range(self.kept[index].ffn), {}, shared)
                continue
            assert sublayer is not None, "the others have live sub-layers of their own"
            if not kept:
                sublayer.remove()
            elif len(kept) < layout.n_units or _has_any(layout, self.outputs):
                sublayer.cut(len(kept), self._pieces(layout, index, kept))

    @property
    def narrow(self) -> Narrow | None:
        return self.stream

    @property
    def units(self) -> Sequence[KeptUnits]:
        return [
            KeptUnits(block.get("attention", ()), block.get("mlp", ()) if not mixed else tuple(range(of.ffn)))
            for block, of, mixed in zip(self.numbers, self.kept, _mixed(self.context), strict=True)
        ]

    def _pieces(self, layout: SublayerLayout, block: int, kept: tuple[int, ...]) -> Mapping[str, Piece]:
        key = (self.keys[block], layout.name)
        return self.context.made.get(key, lambda: self._make(layout, block, kept))

    def _make(self, layout: SublayerLayout, block: int, kept: tuple[int, ...]) -> Mapping[str, Piece]:
        name, needs = layout.output.name, CUT_REPAIRS[self.repair].needs
        inputs = None
        if needs != "nothing":
            inputs = self.sample.statistics.outputs(block, gram=needs == "gram")[name]
        pieces = cut_pieces(layout, kept, inputs, self.repair, self.context.dampening)
        return {x: piece.changed(self.outputs.get(x), None) for x, piece in pieces.items()}


def plan_units(context: RecipeContext, config: Mapping[str, Any]) -> UnitPlan:
    """Plan of a recipe of unit ``structure``. The live model must be dense; it is not changed.

    Of blocks with a mixture of experts it is the attention and the shared experts that lose units. Routed experts stay
    as they are, and the sparsity is the share of the rest. Shared experts keep a channel. Rules that remove whole
    sub-layers remove whole mixtures, too, and the sparsity is the share of all.

    Raises:
        ValueError: if it can't be carried out: too few calibration windows, a rule that does not reach the
            sparsity, scores that rank nothing.
    """
    name, stream = config["metric"]["name"], STREAM_REPAIRS.get(config["repair"])
    check_protect("structure", config["metric"], context.protect)
    sample = context.sample(config["calibration"])
    if name in UNIT_RECONSTRUCTIONS:
        row, sparsity = UNIT_RECONSTRUCTIONS[name], config["sparsity"]
        further = row.values(config["metric"])
        further |= {"domains": sample.sources} if "domains" in row.evidence else {}
        if "prompt" in row.evidence:
            further["prompt"] = () if further["prompt"] == "none" else context.prompts[further["prompt"]]
        seen = f"{name}-{sparsity:g}-{key_of(sorted(context.protected), *sorted(further.items()))}"
        state = {"state": sample.statistics.state(seen)} if row.trains else {}
        found = row.function(
            context.anatomy,
            context.layouts,
            sample.tokens,
            sparsity,
            protected=context.protected,
            **further,
            **state,
        )
        return _plan(context, sample, ChosenUnits(*found), "none", follows=seen)
    repair = "none" if stream else config["repair"]
    if trained_tokens(config):
        numbers, outputs, seen = _trained(context, sample, config, repair)
        return _plan(context, sample, ChosenUnits(numbers, outputs), "none", follows=seen)
    numbers = _numbers(context, sample, config, repair)
    outputs = stream.function(context.anatomy, context.layouts, numbers, sample.tokens) if stream else {}
    follows = config["repair"] if stream else ""
    return _plan(context, sample, ChosenUnits(numbers, outputs), repair, follows=follows)


def _plan(
    context: RecipeContext,
    sample: Sample,
    chosen: ChosenUnits,
    repair: str,
    *,
    follows: str,
) -> UnitPlan:
    """The plan with these units.

    Args:
        follows: method whose weights follow the pruned stream; "": none.
    """
    numbers, outputs, narrow = chosen
    seen = f"{sample.sha256} {context.dampening}"
    keys = tuple(
        _key(
            layout,
            numbers[index],
            follows or repair,
            f"{seen} {numbers[:index] if follows else ()}",
            changed=narrow is not None or any(_has_any(part, outputs) for part in layout.sublayers),
        )
        for index, layout in enumerate(context.layouts)
    )
    kept = tuple(_kept(layout, block) for layout, block in zip(context.layouts, numbers, strict=True))
    shape, width = context.shape, 0
    if narrow is not None:
        width = len(narrow.channels)
        shape = replace(shape, narrower=(narrow_shape(context.anatomy, shape, width),))
    costs = cost(shape, kept, repair, width)
    if any(_mixed(context)):
        parts: list[tuple[SublayerLayout | MixtureLayout, KeptNumbers]] = [
            (x, block)
            for layout, block in zip(context.layouts, numbers, strict=True)
            for x in _counted(layout, block)
        ]
        lost = sum((x.n_units - len(block[x.kind])) * x.unit_params for x, block in parts)
        lost += sum(x.fixed_params for x, block in parts if not block[x.kind])
        costs |= {"sparsity": lost / sum(x.n_units * x.unit_params + x.fixed_params for x, _ in parts)}
    return UnitPlan(keys, costs, kept, context, sample, repair, numbers, outputs, narrow)


def _mixed(context: RecipeContext) -> list[bool]:
    """One flag a block: True if it has experts."""
    return [isinstance(layout.mlp, MixtureLayout) for layout in context.layouts]


def _kept(layout: BlockLayout, numbers: KeptNumbers) -> Kept:
    """Numbers of units that a block keeps: of one with a mixture all routed experts."""
    groups = len(numbers.get("attention", ()))
    if not isinstance(layout.mlp, MixtureLayout):
        return Kept(groups, len(numbers.get("mlp", ())))
    if "experts" in numbers:
        return Kept(groups, len(numbers["experts"]))
    shared, dense = len(numbers.get("mlp", ())), layout.mlp.shared
    return Kept(groups, layout.mlp.n_units, shared=shared if dense and shared < dense.n_units else 0)


def _counted(
    layout: BlockLayout, numbers: KeptNumbers
) -> tuple[SublayerLayout, ...] | tuple[SublayerLayout | MixtureLayout, ...]:
    """Sub-layers that lose units: mixtures where they stay or go as a whole, else their shared experts."""
    return layout.parts if "experts" in numbers else layout.sublayers


def _numbers(
    context: RecipeContext, sample: Sample, config: Mapping[str, Any], repair: str
) -> tuple[KeptNumbers, ...]:
    """Kept units of each block by the recipe's metric, rule and schedule."""
    row = importance_of(config["metric"], len(context.layouts))
    if RULES[config["allocation"]["rule"]].function is in_turn:  # without a schedule
        return numbers_in_turn(context, sample, config, row, repair)
    numbers = whole_numbers(context.layouts)
    for share in shares_of(config):
        now = (
            sample if numbers == whole_numbers(context.layouts) else context.silenced_sample(sample, numbers)
        )
        with silenced(context.layouts, numbers):
            numbers = _round(context, {**config, "sparsity": share}, now, row, repair, numbers)
    return numbers


def _trained(
    context: RecipeContext, sample: Sample, config: Mapping[str, Any], repair: str
) -> tuple[tuple[KeptNumbers, ...], Mapping[str, Tensor], str]:
    """Kept units of each block of a recipe that trains, cut weights of all that stays, and the name of both."""
    row, layouts = importance_of(config["metric"], len(context.layouts)), context.layouts
    rounds = Retraining(context, sample, config)
    numbers = numbers_of(layouts, rounds.facts)
    rounds.begin(linears_of(layouts, numbers))
    for share in rounds.left:
        with rounds.live(), silenced(layouts, numbers):
            now, here = rounds.seen(sample), {**config, "sparsity": share}
            if RULES[config["allocation"]["rule"]].function is in_turn:  # in one round
                after = numbers_in_turn(context, now, here, row, repair)
            else:
                after = _round(context, here, now, row, repair, numbers)
            if rounds.penalty:
                rounds.train(linears_of(layouts, numbers), columns(layouts, numbers), columns(layouts, after))
            repaired = repaired_outputs(context, now, after, numbers, repair)
        rounds.weights |= repaired
        numbers = after
        if not rounds.penalty:
            with rounds.live(), silenced(layouts, numbers):
                rounds.train(linears_of(layouts, numbers), columns(layouts, numbers))
        rounds.end_round(facts_of(numbers))
    with rounds.live(), silenced(layouts, numbers):
        rounds.finish(linears_of(layouts, numbers), columns(layouts, numbers))
    return numbers, cut_trained(layouts, numbers, rounds.weights), rounds.name


def _round(
    context: RecipeContext,
    config: Mapping[str, Any],
    sample: Sample,
    row: Importance,
    repair: str,
    before: Sequence[KeptNumbers],
) -> tuple[KeptNumbers, ...]:
    """Units that are kept at a share of the dense model's, out of those of the live model.

    Args:
        config: with the share as its sparsity.
        sample: with statistics of the live model.
        repair: whose statistics are collected with the others.
        before: units that the live model has.
    """
    flap = "flap" in RULES[config["allocation"]["rule"]].evidence
    needs = most(row.needs, CUT_REPAIRS[repair].inputs, "moments" if flap else "nothing")
    sample.statistics.prepare(outputs=needs, gradients=row.gradients)
    evidence = evidence_of(context, sample, row, needs)
    scores = [row.function(one) for one in evidence]
    left = [
        list(kept[part.kind]) for kept, x in zip(before, context.layouts, strict=True) for part in x.sublayers
    ]
    dense = [layer_of(one.layout, score, context) for one, score in zip(evidence, scores, strict=True)]
    layers = [_left(layer, units) for layer, units in zip(dense, left, strict=True) if units]
    gone = iter(
        removed(
            {**config, "sparsity": of_the_rest(config["sparsity"], dense, layers)},
            layers,
            context,
            sample,
            flap=lambda: tuple(flap_of(one) for one in evidence),
        )
    )
    rows = iter(zip(evidence, scores, left, strict=True))
    found = []
    for layout in context.layouts:
        parts = [next(rows) for _ in layout.sublayers]
        found.append(
            {
                one.layout.kind: stays_of(one.layout, score, units, next(gone)) if units else ()
                for one, score, units in parts
            }
        )
    return tuple(found)


def _left(layer: Layer, units: Sequence[int]) -> Layer:
    """The layer with these units alone."""
    if layer.n_units == 1:
        return layer
    scores = layer.scores[list(units)]
    return replace(layer, n_units=len(units), scores=scores, keep=min(layer.keep, len(units)))


def _has_any(layout: SublayerLayout, weights: Mapping[str, Tensor]) -> bool:
    """True if there is a weight of one of its projections."""
    return any(placement.linear.name in weights for placement in layout.placements)


def _key(layout: BlockLayout, numbers: KeptNumbers, repair: str, seen: str, *, changed: bool) -> str:
    """Equal for equal weights: the data that repairs depend on count where there is something to repair.

    Args:
        changed: whether the block has new weights, or a narrower stream, whatever units it has lost.
    """
    counts = [(len(numbers[part.kind]), part.n_units) for part in _counted(layout, numbers)]
    if not changed and all(n_kept == n_units for n_kept, n_units in counts):
        return DENSE
    repaired = changed or (repair != "none" and any(0 < n_kept < n_units for n_kept, n_units in counts))
    return key_of(dict(numbers), *((repair, seen) if repaired else ()))
