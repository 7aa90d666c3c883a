"""Training in the rounds of a recipe: within the masks, counted, continued after a kill, refused where it can't be."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from secateur.pruners.learned.training import DivergedError, MaskTrainer
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.losses import ce_loss, kl_loss
from secateur.pruners.models.mapped import NotStreamedError
from secateur.pruners.models.shape import model_shape
from secateur.pruners.recipes import retraining
from secateur.pruners.recipes.blocks import plan_blocks
from secateur.pruners.recipes.checks import check_recipe
from secateur.pruners.recipes.plan import LiveBlock
from secateur.pruners.recipes.retraining import Retraining
from secateur.pruners.recipes.units import plan_units
from secateur.pruners.recipes.weights import plan_weights, weights_by_block
from secateur.pruners.stores.recent import Recent
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.schedule import computed_tokens, shares_of, trained_tokens
from tests.mixtures import make_mixture
from tests.models import random_tokens
from tests.recipe_contexts import CALIBRATION, small_context

PLAN = {"weights": plan_weights, "structure": plan_units, "blocks": plan_blocks}
SPARSITY = {"weights": 0.5, "structure": 0.3, "blocks": 0.5}
STEP = 4 * 32
"""Tokens of a step: four windows of the calibration's length."""


def config(unit, **changes):
    form = {"unit": unit, "sparsity": SPARSITY[unit], "calibration": CALIBRATION} | changes
    return completed(form)


def state(context):
    return {name: (p.data_ptr(), p.shape) for name, p in context.anatomy.model.named_parameters()}


def pruned(directory, of, n_layers=4):
    """The plan, the live model pruned by it, and its logits."""
    context = small_context(directory, n_layers)
    before = state(context)
    plan = PLAN[of["unit"]](context, of)
    assert state(context) == before
    layouts = context.layouts if of["unit"] != "weights" else [None] * n_layers
    live = [LiveBlock(block, layout) for block, layout in zip(context.anatomy.blocks, layouts, strict=True)]
    for one in live:
        if plan.keys[one.block.index]:
            plan.change(one)
    with torch.no_grad():
        logits = context.anatomy.model(random_tokens(2, 16, seed=7), use_cache=False).logits
    return context, plan, live, logits


# --- weights in rounds ---


def test_the_cubic_shape_is_that_of_the_paper():
    """Zhu and Gupta, equation 1, with no sparsity at the start: s_t = s_f - s_f (1 - t / n)^3."""
    found = shares_of({"sparsity": 0.8, "schedule": {"steps": 4, "shape": "cubic"}})
    assert found == pytest.approx([0.8 - 0.8 * (1 - t / 4) ** 3 for t in (1, 2, 3, 4)])
    assert shares_of({"sparsity": 0.8, "schedule": {"steps": 4}}) == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "gblm", "random", "formula: G * abs(W)"])
@pytest.mark.parametrize("rule", ["uniform", "global", "owl"])
def test_weights_that_went_stay_away(tmp_path, monkeypatch, metric, rule):
    masks, real = [], Retraining.end_round

    def record(self, facts):
        masks.append({name: weight != 0 for name, weight in self.weights.items()})
        real(self, facts)

    monkeypatch.setattr(Retraining, "end_round", record)
    of = config("weights", metric=metric, allocation=rule, schedule={"steps": 3, "shape": "cubic"})
    context, plan, _, _ = pruned(tmp_path, of, n_layers=2)
    assert len(masks) == 3
    for earlier, later in pairwise(masks):
        assert all(not (later[name] & ~kept).any() for name, kept in earlier.items())
    n_all = sum(x.n_weights for x in context.anatomy.linears)
    zeros = [sum(int((~kept).sum()) for kept in of_round.values()) for of_round in masks]
    assert [n / n_all for n in zeros] == pytest.approx(shares_of(of), abs=2e-3)
    assert plan.costs["sparsity"] == pytest.approx(0.5, abs=2e-3)
    assert dict(plan.sparsity) == {
        x.name: pytest.approx(1 - float(masks[-1][x.name].double().mean())) for x in context.anatomy.linears
    }


def test_scores_that_do_not_change_go_alike_in_rounds(tmp_path):
    """Magnitude looks at nothing but the weights: rounds come to what is pruned at once."""
    form = {"metric": {"name": "magnitude", "comparison": "layer"}}
    *_, at_once = pruned(tmp_path / "once", config("weights", **form))
    *_, in_rounds = pruned(tmp_path / "rounds", config("weights", **form, schedule={"steps": 4}))
    assert torch.equal(at_once, in_rounds)


def test_wanda_is_measured_again_on_what_is_left(tmp_path):
    *_, at_once = pruned(tmp_path / "once", config("weights"))
    *_, in_rounds = pruned(tmp_path / "rounds", config("weights", schedule={"steps": 4}))
    assert not torch.allclose(at_once, in_rounds, atol=1e-4)


@pytest.mark.parametrize("form", [{"metric": "sparsegpt"}, {"repair": "obs"}, {"repair": "admm"}])
def test_reconstructions_and_repairs_go_on_from_the_last_round(tmp_path, form):
    context, plan, *_ = pruned(tmp_path, config("weights", **form, schedule={"steps": 2}), n_layers=2)
    for linear in context.anatomy.linears:
        zeros = float((linear.weight == 0).float().mean())
        assert zeros == pytest.approx(plan.sparsity[linear.name], abs=1e-9) == 0.5


# --- training ---

TRAINED = {
    "weights": {"schedule": {"steps": 2, "retrain": 20 * STEP}},
    "structure": {"metric": "wanda_sp", "schedule": {"steps": 2, "retrain": 20 * STEP}},
    "refit": {"metric": "wanda_sp", "repair": "refit", "schedule": {"steps": 2, "retrain": 20 * STEP}},
    "flap": {"metric": "flap", "allocation": "flap", "schedule": {"after": 40 * STEP}},
    "blocks": {"metric": "shortgpt", "schedule": {"steps": 2, "retrain": 20 * STEP}},
    "around": {"metric": "wanda_sp", "schedule": {"before": 10 * STEP, "after": 20 * STEP, "loss": "kl"}},
    "penalty": {"metric": "wanda_sp", "schedule": {"retrain": 40 * STEP, "penalty": 0.1}},
    "penalty of weights": {"schedule": {"steps": 2, "retrain": 20 * STEP, "penalty": 0.1}},
}
UNITS = {"weights": "weights", "blocks": "blocks", "penalty of weights": "weights"}


@pytest.mark.parametrize("case", TRAINED)
def test_the_loss_is_lower_than_without_training_at_equal_costs(tmp_path, case):
    of = config(UNITS.get(case, "structure"), **TRAINED[case])
    untrained = {k: v for k, v in of.items() if k != "schedule"}
    losses, costs = [], []
    for name, form in (("with", of), ("without", untrained)):
        context, plan, live, _ = pruned(tmp_path / name, form)
        rounds_tokens = context.pools["calibration"].tokens[:512].view(-1, 32)
        with torch.no_grad():
            if of["schedule"].get("loss") == "kl":
                dense = small_context(tmp_path / "dense", 4).anatomy
                losses.append(float(kl_loss(context.anatomy, rounds_tokens, dense)))
            else:
                losses.append(float(ce_loss(context.anatomy, rounds_tokens)))
        costs.append(plan.costs["sparsity"])
        for one in live:
            one.restore()
    assert losses[0] < losses[1] - (0.005 if "loss" in of["schedule"] else 0.02)
    assert costs[0] == pytest.approx(costs[1], abs=0.01)


@pytest.mark.parametrize("unit", PLAN)
def test_a_killed_run_continues_to_the_same_weights(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(MaskTrainer, "SAVE_SECONDS", 0.0)
    of = config(unit, schedule={"before": 2 * STEP, "steps": 2, "retrain": 4 * STEP, "after": 2 * STEP})
    whole = pruned(tmp_path / "whole", of)
    for kill in (4, 11):
        taken, real = [], Retraining._loss

        def loss(self, step, taken=taken, real=real, kill=kill):
            taken.append(step)
            if step == kill:
                raise KeyboardInterrupt
            return real(self, step)

        directory = tmp_path / f"killed{kill}"
        with monkeypatch.context() as patch:
            patch.setattr(Retraining, "_loss", loss)
            with pytest.raises(KeyboardInterrupt):
                pruned(directory, of)
        assert taken == [*range(kill + 1)]

        def counted(self, step, taken=taken, real=real):
            taken.append(step)
            return real(self, step)

        with monkeypatch.context() as patch:
            patch.setattr(Retraining, "_loss", counted)
            _, plan, _, logits = pruned(directory, of)
            assert taken == [*range(kill + 1), *range(kill, 12)]
            assert torch.equal(logits, whole[3])
            assert plan.keys == whole[1].keys
            pruned(directory, of)  # over: nothing is trained again
        assert len(taken) == kill + 1 + 12 - kill


def test_windows_go_on_from_round_to_round_beyond_those_of_the_calibration(tmp_path):
    of = config("weights", schedule={"steps": 2, "retrain": 3 * STEP})
    context = small_context(tmp_path, 2)
    rounds = Retraining(context, context.sample(of["calibration"]), of)
    assert rounds._tokens.shape == (16, 32)  # all of the pool's 512 tokens
    assert torch.equal(rounds._tokens[:4], context.sample(of["calibration"]).tokens)
    assert [rounds._rows(step) for step in (0, 3, 4)] == [[0, 1, 2, 3], [12, 13, 14, 15], [0, 1, 2, 3]]


def test_projections_alone_are_trained_and_protected_ones_are_not(tmp_path):
    context = small_context(tmp_path, 2)
    held = next(iter(context.anatomy.linears)).name
    plan = plan_weights(replace(context, protect=(held,)), config("weights", schedule={"retrain": 4 * STEP}))
    assert set(plan.pruning.weights) == {x.name for x in context.anatomy.linears} - {held}


def test_tokens_are_counted_with_the_backward_pass():
    of = config("structure", schedule={"steps": 3, "retrain": STEP + 1, "before": 1, "after": 5 * STEP})
    assert trained_tokens(of) == (1 + 3 * 2 + 5) * STEP
    assert computed_tokens(of) == 3 * 12 * STEP
    taught = config("structure", schedule={**of["schedule"], "loss": "kl"})
    assert computed_tokens(taught) == 4 * 12 * STEP
    assert computed_tokens(config("structure")) == 0
    by_size = config("structure", schedule={"step": 0.1, "retrain": STEP})
    assert trained_tokens(by_size) == 3 * STEP


def test_a_training_that_diverges_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(retraining, "ce_loss", lambda anatomy, tokens: ce_loss(anatomy, tokens) * math.inf)
    with pytest.raises(DivergedError, match=r"finite losses of the `schedule` of a recipe, .* step 0 of 2"):
        plan_weights(small_context(tmp_path, 1), config("weights", schedule={"retrain": 2 * STEP}))


# --- what is refused ---

WRONG = {
    "both": (
        {"schedule": {"step": 0.1, "steps": 2}},
        "one of `schedule.steps` and `schedule.step`, got 2 and 0.1",
    ),
    "shape": ({"schedule": {"shape": "cubic"}}, "`schedule.steps` > 1 with `schedule.shape: cubic`, got 1"),
    "loss": ({"schedule": {"loss": "kl"}}, "with `schedule.loss`, got none"),
    "rate": ({"schedule": {"lr": 1, "steps": 3}}, "with `schedule.lr`, got none"),
    "penalty": ({"schedule": {"penalty": 1, "after": 9}}, "`schedule.retrain` with `schedule.penalty`"),
    "rule": ({"schedule": {"steps": 2}, "allocation": "flap"}, "no `schedule` with the rule flap"),
    "bias": ({"schedule": {"retrain": 9}, "repair": "bias"}, "rounds can go on from .* got 'bias'"),
    "stream": ({"schedule": {"retrain": 9}, "repair": "kprune"}, "rounds can go on from .* got 'kprune'"),
    "repair": (
        {"schedule": {"retrain": 9, "penalty": 1}, "repair": "obs"},
        "rounds can go on from .* got 'obs'",
    ),
    "kprune": (
        {"schedule": {"retrain": 9}, "metric": "kprune", "allocation": "global"},
        "no `schedule` with the metric kprune",
    ),
    "tokens": (
        {"schedule": {"retrain": -1}},
        r"`schedule.retrain` to be a whole number within \[0, 1,000,000,000\], got -1",
    ),
}
OTHERS = {
    "surgeon": (
        "weights",
        {"schedule": {"steps": 2}, "metric": "llm_surgeon"},
        "prunes more than a layer at once",
    ),
    "sparsellm": (
        "weights",
        {"schedule": {"steps": 2}, "metric": "sparsellm"},
        "prunes more than a layer at once",
    ),
    "bias": ("weights", {"schedule": {"steps": 2}, "repair": "bias"}, "rounds can go on from"),
    "self": (
        "weights",
        {"schedule": {"retrain": 9, "penalty": 1}, "metric": "sparsegpt"},
        "a metric with scores",
    ),
    "merged": ("blocks", {"schedule": {"retrain": 9}, "metric": "laco", "repair": "laco"}, "got 'laco'"),
    "experts": ("experts", {"schedule": {"steps": 2}}, "known keys of a recipe of experts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_schedules_are_named(case):
    form, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        completed({"unit": "structure", "sparsity": 0.2, **form})


@pytest.mark.parametrize("case", OTHERS)
def test_what_other_units_cannot_serve_is_named(case):
    unit, form, message = OTHERS[case]
    with pytest.raises(ValueError, match=message):
        completed({"unit": unit, "sparsity": 0.2, **form})


def test_bias_without_training_and_in_one_round_is_as_before():
    form = {"unit": "structure", "sparsity": 0.2, "repair": "bias", "schedule": {"steps": 2}}
    assert completed(form)["repair"] == "bias"


def test_a_streamed_prune_with_a_schedule_is_refused(tmp_path):
    with pytest.raises(NotStreamedError, match="a recipe without `schedule`"):
        weights_by_block(small_context(tmp_path, 1), config("weights", schedule={"retrain": STEP}))


def test_experts_of_a_mixture_are_trained_within_their_masks(tmp_path):
    mixed = dissect(make_mixture("mixtral"))
    before = {x.name: x.weight.clone() for x in mixed.linears}
    of = config("weights", metric="magnitude", schedule={"steps": 2, "retrain": STEP})
    check_recipe(of, mixed)
    plan = plan_weights(replace(small_context(tmp_path, 1), anatomy=mixed, made=Recent(0)), of)
    live = [LiveBlock(block) for block in mixed.blocks]
    for one in live:
        plan.change(one)
    experts = [x for x in mixed.linears if x.expert is not None]
    zeros = sum(int((x.weight == 0).sum()) for x in mixed.linears)
    assert zeros / sum(x.n_weights for x in mixed.linears) == pytest.approx(of["sparsity"], abs=1e-3)
    trained = [x for x in experts if not torch.equal(x.weight, before[x.name] * (x.weight != 0))]
    assert len(trained) > len(experts) / 2
    for one in live:
        one.restore()
    assert all(torch.equal(x.weight, before[x.name]) for x in mixed.linears)


@pytest.mark.parametrize(
    ("unit", "metric", "name"), [("structure", "wanda_sp", "qwen2_moe"), ("blocks", "last", "mixtral")]
)
def test_what_stays_of_a_mixture_is_trained(tmp_path, unit, metric, name):
    mixed = dissect(make_mixture(name))
    before = {x.name: x.weight.clone() for x in mixed.linears}
    of = config(unit, metric=metric, schedule={"retrain": STEP})
    check_recipe(of, mixed)
    shape = model_shape(mixed, 8, 4)
    context = replace(small_context(tmp_path, 1), anatomy=mixed, shape=shape, made=Recent(0))
    plan = PLAN[unit](context, of)
    live = [LiveBlock(block, layout) for block, layout in zip(mixed.blocks, context.layouts, strict=True)]
    for one in live:
        if plan.keys[one.block.index]:
            plan.change(one)
    routed = [x for x in mixed.blocks[0 if unit == "blocks" else 1].linears if x.expert is not None]
    changed = [x for x in routed if not torch.equal(x.weight, before[x.name])]
    if unit == "structure":
        shared = [x for x in mixed.linears if x.sublayer == "experts" and x.expert is None]
        assert shared
        assert not changed
        assert all(torch.equal(x.weight, plan.outputs[x.name]) for x in shared)
    else:
        assert [kept.ffn for kept in plan.kept] == [6, 0]
        assert len(changed) > len(routed) / 2
    for one in live:
        one.restore()
    assert all(torch.equal(x.weight, before[x.name]) for x in mixed.linears)


def test_little_memory_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(retraining, "MaskTrainer", None)
    monkeypatch.setattr("secateur.pruners.models.memory.available_bytes", lambda device: 10)
    with pytest.raises(ValueError, match="GB of memory for the training of the `schedule` of a recipe"):
        plan_weights(
            small_context(tmp_path, 1), config("weights", metric="magnitude", schedule={"retrain": 9})
        )


def test_the_text_of_a_schedule_is_read_again():
    for unit, schedule, text in (
        (
            "weights",
            {"steps": 8, "shape": "cubic", "retrain": 4096},
            "schedule steps=8; shape=cubic; retrain=4096",
        ),
        ("structure", {"step": 0.05, "retrain": 9, "lr": 1e-5}, "schedule 0.05; retrain=9; lr=1e-05"),
        ("blocks", {"after": 9, "loss": "kl"}, "schedule after=9; loss=kl"),
    ):
        recipe = Recipe.of({"unit": unit, "sparsity": 0.2, "schedule": schedule})
        assert f" | {text} | repair none" in recipe.text
        assert Recipe.parse(recipe.text) == recipe
        assert recipe.plain["schedule"] == schedule
    with pytest.raises(ValueError, match="Expected a recipe such as"):
        Recipe.parse("recipe: weights 0.2 | schedule  | repair none")
