"""Recipes that cut KV groups and FFN channels: choice of the kept units, their weights and repairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.stream import most
from secateur.pruners.models.check_kept import check_parts
from secateur.pruners.models.cutting import Piece
from secateur.pruners.models.layout import BlockLayout, MixtureLayout, SublayerLayout
from secateur.pruners.models.live_experts import LiveExperts
from secateur.pruners.recipes.allocation.allocate import removed
from secateur.pruners.recipes.allocation.layers import Floats, Layer, kind_of
from secateur.pruners.recipes.allocation.sublayers import in_turn
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.metric import Importance, importance_of
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan, key_of
from secateur.pruners.recipes.schedule import shares_of, silenced, whole_numbers
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.flap import standardised_flap
from secateur.pruners.structure.kprune import FOLLOWS, KeptNumbers
from secateur.pruners.structure.reorder import cut_pieces
from secateur.spaces.architecture.candidate import Kept, KeptUnits
from secateur.spaces.architecture.cost import cost
from secateur.spaces.method import Detail
from secateur.spaces.methods import CUT_REPAIRS, RULES, STREAM_REPAIRS, UNIT_RECONSTRUCTIONS


@dataclass(frozen=True)
class UnitPlan(PruningPlan):
    """Plan that cuts units.

    Args:
        context: of the recipe.
        sample: its calibration windows.
        repair: a row of `CUT_REPAIRS`.
        numbers: of the kept units of each block, ascending.
        outputs: weights that follow the pruned stream, of output projections by their full names.
    """

    context: RecipeContext
    sample: Sample
    repair: str
    numbers: tuple[KeptNumbers, ...]
    outputs: Mapping[str, Tensor]

    def change(self, live: LiveBlock) -> None:
        index = live.block.index
        for layout in self.context.layouts[index].sublayers:
            kept = self.numbers[index][layout.kind]
            sublayer = live.sublayers.get(layout.kind, live.sublayers.get("experts"))
            if isinstance(sublayer, LiveExperts):
                if len(kept) < layout.n_units:
                    shared = (len(kept), self._pieces(layout, index, kept))
                    sublayer.cut(range(self.kept[index].ffn), {}, shared)
                continue
            assert sublayer is not None, "the others have live sub-layers of their own"
            if not kept:
                sublayer.remove()
            elif len(kept) < layout.n_units:
                sublayer.cut(len(kept), self._pieces(layout, index, kept))

    @property
    def units(self) -> Sequence[KeptUnits]:
        return [
            KeptUnits(block["attention"], block["mlp"] if not mixed else tuple(range(of.ffn)))
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
        return pieces | {name: pieces[name].changed(self.outputs.get(name), None)}


def plan_units(context: RecipeContext, config: Mapping[str, Any]) -> UnitPlan:
    """Plan of a recipe of unit ``structure``. The live model must be dense; it is not changed.

    Of blocks with a mixture of experts it is the attention and the shared experts that lose units. Routed experts stay
    as they are, and the sparsity is the share of the rest. Shared experts keep a channel.

    Raises:
        ValueError: if it can't be carried out: too few calibration windows, a rule that does not reach the
            sparsity, scores that rank nothing, a method that follows the stream in a model with experts.
    """
    name, stream = config["metric"]["name"], STREAM_REPAIRS.get(config["repair"])
    if stream or name in UNIT_RECONSTRUCTIONS:
        check_parts(context.layouts, FOLLOWS)
    sample = context.sample(config["calibration"])
    if name in UNIT_RECONSTRUCTIONS:
        numbers, outputs = UNIT_RECONSTRUCTIONS[name].function(
            context.anatomy, context.layouts, sample.tokens, config["sparsity"], protected=context.protected
        )
        return _plan(context, sample, numbers, outputs, "none", follows=name)
    repair = "none" if stream else config["repair"]
    numbers = _numbers(context, sample, config, repair)
    outputs = stream.function(context.anatomy, context.layouts, numbers, sample.tokens) if stream else {}
    return _plan(context, sample, numbers, outputs, repair, follows=config["repair"] if stream else "")


def _plan(
    context: RecipeContext,
    sample: Sample,
    numbers: tuple[KeptNumbers, ...],
    outputs: Mapping[str, Tensor],
    repair: str,
    *,
    follows: str,
) -> UnitPlan:
    """The plan with these units.

    Args:
        follows: method whose weights follow the pruned stream; "": none.
    """
    seen = f"{sample.sha256} {context.dampening}"
    keys = tuple(
        _key(layout, numbers[index], follows or repair, f"{seen} {numbers[:index] if follows else ()}")
        for index, layout in enumerate(context.layouts)
    )
    kept = tuple(_kept(layout, block) for layout, block in zip(context.layouts, numbers, strict=True))
    costs = cost(context.shape, kept, repair)
    if any(_mixed(context)):
        parts = [
            (x, block)
            for layout, block in zip(context.layouts, numbers, strict=True)
            for x in layout.sublayers
        ]
        lost = sum((x.n_units - len(block[x.kind])) * x.unit_params for x, block in parts)
        lost += sum(x.fixed_params for x, block in parts if not block[x.kind])
        costs |= {"sparsity": lost / sum(x.n_units * x.unit_params + x.fixed_params for x, _ in parts)}
    return UnitPlan(keys, costs, kept, context, sample, repair, numbers, outputs)


def _mixed(context: RecipeContext) -> list[bool]:
    """One flag a block: True if it has experts."""
    return [isinstance(layout.mlp, MixtureLayout) for layout in context.layouts]


def _kept(layout: BlockLayout, numbers: KeptNumbers) -> Kept:
    """Numbers of units that a block keeps: of one with a mixture all routed experts."""
    groups = len(numbers["attention"])
    if isinstance(layout.mlp, SublayerLayout):
        return Kept(groups, len(numbers["mlp"]))
    shared, dense = len(numbers.get("mlp", ())), layout.mlp.shared
    return Kept(groups, layout.mlp.n_units, shared=shared if dense and shared < dense.n_units else 0)


def _numbers(
    context: RecipeContext, sample: Sample, config: Mapping[str, Any], repair: str
) -> tuple[KeptNumbers, ...]:
    """Kept units of each block by the recipe's metric, rule and schedule."""
    row = importance_of(config["metric"], len(context.layouts))
    numbers = whole_numbers(context.layouts)
    for share in shares_of(config):
        now = (
            sample if numbers == whole_numbers(context.layouts) else context.silenced_sample(sample, numbers)
        )
        with silenced(context.layouts, numbers):
            numbers = _round(context, {**config, "sparsity": share}, now, row, repair, numbers)
    return numbers


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
    evidence = _evidence(context, sample, row, needs)
    scores = [row.function(one) for one in evidence]
    left = [
        list(kept[part.kind]) for kept, x in zip(before, context.layouts, strict=True) for part in x.sublayers
    ]
    whole = RULES[config["allocation"]["rule"]].function is in_turn
    dense = [
        _layer(one.layout, score, context, whole=whole) for one, score in zip(evidence, scores, strict=True)
    ]
    layers = [_left(layer, units) for layer, units in zip(dense, left, strict=True) if units]
    gone = iter(
        removed(
            {**config, "sparsity": _of_the_rest(config["sparsity"], dense, layers)},
            layers,
            context,
            sample,
            flap=lambda: tuple(_flap(one) for one in evidence),
        )
    )
    rows = iter(zip(evidence, scores, left, strict=True))
    found = []
    for layout in context.layouts:
        parts = [next(rows) for _ in layout.sublayers]
        found.append(
            {
                one.layout.kind: _highest(
                    score, units, _n_left(one.layout, len(units), next(gone), whole=whole)
                )
                if units
                else ()
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


def _of_the_rest(share: float, dense: Sequence[Layer], layers: Sequence[Layer]) -> float:
    """Share of what is left that is to go, so that this share of all will have gone."""
    whole, rest = (sum(layer.n_weights for layer in some) for some in (dense, layers))
    return share if whole == rest else max(0.0, (share * whole - (whole - rest)) / rest)


def _evidence(context: RecipeContext, sample: Sample, row: Importance, needs: Detail) -> list[Evidence]:
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


def _flap(evidence: Evidence) -> Floats:
    found: Floats = standardised_flap(evidence).double().cpu().numpy()
    return found.mean(keepdims=True) if evidence.layout.rigid else found


def _n_left(layout: SublayerLayout, n_units: int, gone: int, *, whole: bool) -> int:
    """Units that stay of so many: all or none where it can't be cut."""
    return (n_units if not gone else 0) if _is_one(layout, whole=whole) else n_units - gone


def _is_one(layout: SublayerLayout, *, whole: bool) -> bool:
    """True if a sub-layer is kept or removed as a whole."""
    return layout.rigid or (bool(layout.parallel) and whole)


def _layer(
    layout: SublayerLayout, score: Float[Tensor, " units"], context: RecipeContext, *, whole: bool
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


def _highest(score: Float[Tensor, " units"], units: Sequence[int], n_kept: int) -> tuple[int, ...]:
    """Numbers of the units with the highest scores, ascending; of equal scores the larger numbers are kept."""
    order = score[list(units)].argsort(stable=True).flip(0)[:n_kept]
    return tuple(sorted(units[place] for place in order.tolist()))


def _key(layout: BlockLayout, numbers: KeptNumbers, repair: str, seen: str) -> str:
    """Equal for equal weights: the data that repairs depend on count where there is something to repair."""
    counts = [(len(numbers[part.kind]), part.n_units) for part in layout.sublayers]
    if all(n_kept == n_units for n_kept, n_units in counts):
        return DENSE
    repaired = repair != "none" and any(0 < n_kept < n_units for n_kept, n_units in counts)
    return key_of(dict(numbers), *((repair, seen) if repaired else ()))
