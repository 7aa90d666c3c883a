"""Recipes in rounds: what is left is measured again, at each share the right number goes, and the model stays dense."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from secateur.pruners.calibration.stream import mean_loss
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.recipes import units
from secateur.pruners.recipes.blocks import plan_blocks
from secateur.pruners.recipes.schedule import silenced, whole_numbers
from secateur.pruners.recipes.units import plan_units
from secateur.pruners.structure import bonsai
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.choices import items_of, plain_of
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.recipe.schedule import shares_of
from tests.models import random_tokens
from tests.recipe_contexts import CALIBRATION, small_context
from tests.recipe_toy import recipe_space
from tests.structures import take_few_passes

GLOBAL = {"rule": "global", "normalise": "mean"}


def config(unit, sparsity, **changes):
    return completed({"unit": unit, "sparsity": sparsity, "calibration": CALIBRATION, **changes})


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return small_context(tmp_path_factory.mktemp("statistics"), n_layers=5)


def state(context):
    return {name: (p.data_ptr(), p.shape) for name, p in context.anatomy.model.named_parameters()}


def logits(context):
    with torch.no_grad():
        return context.anatomy.model(random_tokens(2, 16, seed=7), use_cache=False).logits


# --- rounds ---


def test_shares_of_rounds():
    assert shares_of({"sparsity": 0.2}) == [0.2]
    assert shares_of({"sparsity": 0.2, "schedule": {"step": 0.05}}) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert shares_of({"sparsity": 0.12, "schedule": {"step": 0.05}}) == pytest.approx([0.05, 0.1, 0.12])
    assert shares_of({"sparsity": 0.03, "schedule": {"step": 0.05}}) == [0.03]


def test_the_silenced_model_is_the_cut_one(context):
    """Its losses are those of the model that a plan cuts, though all shapes are dense."""
    before, dense = state(context), logits(context)
    numbers = whole_numbers(context.layouts)
    kept = [dict(block) for block in numbers]
    kept[1] |= {"mlp": tuple(range(5, 40)), "attention": (1,)}
    kept[2] |= {"mlp": ()}
    with silenced(context.layouts, kept):
        found = logits(context)
        assert context.layouts[1].mlp.output.weight[:, :5].abs().sum() == 0
        assert context.layouts[1].mlp.output.weight[:, 5:40].abs().min() > 0
    assert state(context) == before
    assert torch.equal(logits(context), dense)
    live = [units.LiveBlock(layout.block, layout) for layout in context.layouts]
    for index, block in enumerate(live):
        for part in context.layouts[index].sublayers:
            chosen = kept[index][part.kind]
            if not chosen:
                block.sublayers[part.kind].remove()
            elif len(chosen) < part.n_units:
                block.sublayers[part.kind].cut(len(chosen), units.cut_pieces(part, chosen))
    cut = logits(context)
    for block in live:
        block.restore()
    assert not torch.allclose(found, dense, atol=1e-3)
    assert torch.allclose(found, cut, atol=1e-5)


def test_units_that_went_stay_away_and_every_share_is_met(context, monkeypatch):
    seen, real = [], units._round

    def recorded(context, config, sample, row, repair, before):
        seen.append((config["sparsity"], sample.sha256, before))
        return real(context, config, sample, row, repair, before)

    monkeypatch.setattr(units, "_round", recorded)
    before = state(context)
    form = config("structure", 0.4, allocation=GLOBAL, schedule={"step": 0.1})
    plan = plan_units(context, form)
    assert state(context) == before
    assert [share for share, _, _ in seen] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert len({sha for _, sha, _ in seen}) == 4  # statistics of four models
    models = [*(numbers for _, _, numbers in seen), plan.numbers]
    n_all = sum(part.n_units for layout in context.layouts for part in layout.sublayers)
    left = [sum(len(kept) for block in model for kept in block.values()) for model in models]
    assert left[0] == n_all
    assert all(a > b for a, b in pairwise(left))
    for earlier, later in pairwise(models):
        for a, b in zip(earlier, later, strict=True):
            assert all({*b[kind]} <= {*a[kind]} for kind in a)
    assert plan.costs["sparsity"] == pytest.approx(0.4, abs=0.01)
    at_once = plan_units(context, config("structure", 0.4, allocation=GLOBAL))
    assert plan.numbers != at_once.numbers  # measured again: other units


def test_scores_that_do_not_change_go_alike_in_rounds(context):
    """Magnitude looks at nothing but the weights: rounds come to what one threshold does at once."""
    form = {"metric": "magnitude", "allocation": {"rule": "global", "normalise": "none"}}
    at_once = plan_units(context, config("structure", 0.3, **form))
    in_rounds = plan_units(context, config("structure", 0.3, **form, schedule={"step": 0.1}))
    apart = sum(
        len({*a[kind]} ^ {*b[kind]})
        for a, b in zip(at_once.numbers, in_rounds.numbers, strict=True)
        for kind in a
    )
    assert apart <= 6  # groups that don't fit into a round, and what makes up for them


@pytest.mark.parametrize("rule", ["uniform", "cfsp", "adapt", "nirvana", "atp"])
def test_every_rule_goes_on_where_it_stopped(context, rule):
    plan = plan_units(context, config("structure", 0.3, allocation=rule, schedule={"step": 0.1}))
    assert plan.costs["sparsity"] == pytest.approx(0.3, abs=0.02)


# --- Bonsai ---


def test_bonsai_measures_what_is_left(context, monkeypatch):
    """Each round leaves out units that are still there, a tenth of each sub-layer at most, all sub-layers at once."""
    masks, real = [], bonsai._leave_out

    def record(sublayer, gone):
        masks.append((sublayer.layout.output.name, sublayer.loose.tolist(), int(gone.sum())))
        return real(sublayer, gone)

    monkeypatch.setattr(bonsai, "_leave_out", record)
    take_few_passes(monkeypatch)
    form = config("structure", 0.1, **KNOWN["bonsai"].form)
    plan = plan_units(context, form)
    n_parts = 2 * len(context.layouts)
    assert len(masks) == 2 * 2 * 2 * n_parts  # rounds, pairs, masks of a pair, sub-layers at once
    n_units = {part.output.name: part.n_units for x in context.layouts for part in x.sublayers}
    first, second = masks[: len(masks) // 2], masks[len(masks) // 2 :]
    for name, loose, n_gone in first:
        assert len(loose) == max(1, -(-n_units[name] // 10))
        assert abs(2 * n_gone - len(loose)) <= 1
    gone = {
        part.output.name: {*range(part.n_units)} - {*kept[part.kind]}
        for x, kept in zip(context.layouts, plan.numbers, strict=True)
        for part in x.sublayers
    }
    loose_before = {name: {*loose} for name, loose, _ in first}
    later = {name: {*loose} for name, loose, _ in second}
    assert all(gone[name] <= loose_before[name] | later[name] for name in gone)
    assert any(later[name] != loose_before[name] for name in gone)
    assert plan.costs["sparsity"] == pytest.approx(0.1, abs=0.01)


# --- blocks ---


def test_sleb_is_greedy(context):
    """The slow form: without each block in turn, and again without what went."""
    sample = context.sample(CALIBRATION | {"choose": "random", "subset": 0})
    runner, gone = BlockRunner(context.anatomy), []

    def loss(without):
        inputs = runner.start(sample.tokens)
        hidden = inputs.hidden
        for index in range(5):
            hidden = hidden if index in without else runner.block(index, hidden, inputs)
        return mean_loss(context.anatomy, hidden, sample.tokens)

    with torch.no_grad():
        for _ in range(2):
            gone.append(min({1, 2, 3} - {*gone}, key=lambda index: loss([*gone, index])))
    before = state(context)
    plan = plan_blocks(context, config("blocks", 0.4, **KNOWN["sleb"].form))
    assert [index for index, kept in enumerate(plan.kept) if kept.ffn == 0] == sorted(gone)
    assert state(context) == before


@pytest.mark.parametrize("metric", ["shortgpt", "shortened_taylor", "streamline", "last"])
def test_other_scores_of_blocks_are_measured_again(context, metric):
    plan = plan_blocks(context, config("blocks", 0.4, metric=metric, schedule={"step": 0.2}))
    assert sum(kept.ffn == 0 for kept in plan.kept) == 2
    assert plan.kept[0].ffn


# --- the form ---


def test_the_schedule_is_written_where_there_is_one():
    plain = {"unit": "structure", "sparsity": 0.2, "metric": "bonsai_round", "schedule": {"step": 0.05}}
    recipe = Recipe.of(plain)
    assert " | schedule 0.05 | repair none" in recipe.text
    assert Recipe.parse(recipe.text) == recipe
    assert recipe.plain["schedule"] == {"step": 0.05}
    without = Recipe.of({**plain, "schedule": {"step": 1}})
    assert "schedule" not in without.text
    assert "schedule" not in without.plain
    assert items_of(without.plain, ("calibration",))["schedule.step"] == 1
    items = items_of(recipe.plain, ("calibration",))
    assert completed(plain_of(items, "structure", 0.2)) == recipe.plain


WRONG = {
    "weights": ({"unit": "weights", "schedule": {"step": 0.1}}, "known keys of a recipe of weights"),
    "zero": ({"unit": "structure", "schedule": {"step": 0}}, r"`schedule.step` within \[0.001, 1\], got 0"),
    "flap": (
        {"unit": "structure", "schedule": {"step": 0.1}, "allocation": "flap"},
        "no `schedule` with the rule flap, which looks at the dense model",
    ),
    "number": ({"unit": "structure", "schedule": 0.1}, "`schedule` to hold keys, got 0.1"),
    "rounds": (
        {"unit": "weights", "schedule": {"steps": 10**8}},
        r"`schedule.steps` to be a whole number within \[1, 1,000\], got 100000000",
    ),
    "tokens": (
        {"unit": "weights", "schedule": {"after": 10**12}},
        r"`schedule.after` to be a whole number within \[0, 1,000,000,000\], got 1000000000000",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_schedules_are_named(case):
    form, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        completed({"sparsity": 0.2, **form})


def test_a_search_keeps_the_schedule_of_a_recipe():
    space = recipe_space(start="bonsai", known=["flap"])
    bonsai_, flap = space.baselines()["bonsai@0.2"], space.baselines()["flap@0.2"]
    rng = np.random.default_rng(0)
    assert bonsai_.plain["schedule"] == {"step": 0.05}
    for _ in range(40):
        child, other = space.mutate(bonsai_, rng), space.mutate(flap, rng)
        dense_rule = child.plain["allocation"]["rule"] == "flap"
        assert ("schedule" in child.plain) != dense_rule
        assert "schedule" not in other.plain
        assert "schedule" not in space.crossover(flap, bonsai_, rng).plain
