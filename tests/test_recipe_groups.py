"""Recipes of weights with a pattern, so many of every so many: at once, in rounds, and with training."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.recipes.checks import check_recipe
from secateur.pruners.recipes.plan import LiveBlock
from secateur.pruners.recipes.retraining import Retraining
from secateur.pruners.recipes.weights import plan_weights
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.form import completed
from tests.recipe_contexts import CALIBRATION, small_context

STEP = 4 * 32
"""Tokens of a step: four windows of the calibration's length."""


def config(metric, sparsity=0.5, **changes):
    form = {"unit": "weights", "sparsity": sparsity, "calibration": CALIBRATION, "metric": metric}
    return completed(form | changes)


def pruned(directory, of, protect=()):
    """Context, plan, and the dense weights by name; the live model is pruned."""
    context = replace(small_context(directory, 2), protect=tuple(protect))
    dense = {x.name: x.weight.clone() for x in context.anatomy.linears}
    plan = plan_weights(context, of)
    for block in context.anatomy.blocks:
        plan.change(LiveBlock(block))
    return context, plan, dense


def zeros_in_groups(weight, size):
    return (weight == 0).reshape(-1, size).sum(1)


@pytest.mark.parametrize(
    "metric", ["magnitude", "wanda", "sparsegpt", "formula: abs(W)", "blend", "admm_gradual"]
)
@pytest.mark.parametrize(("sparsity", "size"), [(0.5, 4), (0.75, 8)])
def test_each_group_has_its_zeros(tmp_path, metric, sparsity, size):
    context, plan, _ = pruned(tmp_path, config({"name": metric, "group_size": size}, sparsity))
    for linear in context.anatomy.linears:
        assert set(zeros_in_groups(linear.weight, size).tolist()) == {sparsity * size}
        assert plan.sparsity[linear.name] == sparsity
    assert plan.costs["sparsity"] == sparsity


def test_wanda_in_groups_by_a_slow_reference(tmp_path):
    context, _, dense = pruned(tmp_path, config({"name": "wanda", "group_size": 4}))
    fresh = small_context(tmp_path / "fresh", 2)
    sample = fresh.sample(config("wanda")["calibration"])
    norms = {}
    for statistics in stream_blocks(fresh.anatomy, sample.tokens, inputs="moments"):
        norms |= {name: x.sum_squares.sqrt() for name, x in statistics.inputs.items()}
    for linear in context.anatomy.linears:
        kept = torch.zeros_like(dense[linear.name], dtype=torch.bool)
        score = dense[linear.name].abs() * norms[linear.name]
        for row in range(len(score)):
            for start in range(0, score.shape[1], 4):
                of_group = score[row, start : start + 4].tolist()
                best = sorted(range(4), key=lambda i, of_group=of_group: of_group[i])[2:]
                kept[row, [start + i for i in best]] = True
        assert torch.equal(linear.weight, dense[linear.name] * kept)


@pytest.mark.parametrize("shape", ["linear", "cubic"])
def test_groups_lose_their_weights_round_by_round(tmp_path, monkeypatch, shape):
    masks, real = [], Retraining.end_round

    def record(self, facts):
        masks.append({name: weight != 0 for name, weight in self.weights.items()})
        real(self, facts)

    monkeypatch.setattr(Retraining, "end_round", record)
    schedule = {"steps": 4, "retrain": STEP, "shape": shape}
    of = config({"name": "wanda", "group_size": 8}, schedule=schedule)
    context, *_ = pruned(tmp_path, of)
    # Of 4 zeros at the end: t / 4 of them, or 1 - (1 - t / 4)^3 = 0.578, 0.875, 0.984, 1.
    wanted = {"linear": [1, 2, 3, 4], "cubic": [2, 4, 4, 4]}[shape]
    for kept, n in zip(masks, wanted, strict=True):
        for linear in context.anatomy.linears:
            assert set(zeros_in_groups(kept[linear.name], 8).tolist()) == {n}
    for earlier, later in pairwise(masks):
        assert all(not (later[name] & ~kept).any() for name, kept in earlier.items())


def test_training_keeps_the_pattern_and_lowers_the_loss(tmp_path):
    losses = {}
    for name, more in {
        "untrained": {},
        "rounds": {"schedule": {"steps": 2, "retrain": 20 * STEP}},
        "penalty": {"schedule": {"retrain": 40 * STEP, "penalty": 0.1}},
    }.items():
        context, *_ = pruned(tmp_path / name, config({"name": "wanda", "group_size": 4}, **more))
        for linear in context.anatomy.linears:
            assert set(zeros_in_groups(linear.weight, 4).tolist()) == {2}
        tokens = context.sample(config("wanda")["calibration"]).tokens
        with torch.no_grad():
            losses[name] = float(ce_loss(context.anatomy, tokens))
    assert max(losses["rounds"], losses["penalty"]) < losses["untrained"] - 0.05


def test_protected_projections_stay_dense(tmp_path):
    held = "model.layers.0.mlp.up_proj"
    context, plan, dense = pruned(tmp_path, config({"name": "magnitude", "group_size": 4}), protect=[held])
    weights = {x.name: x.weight for x in context.anatomy.linears}
    assert torch.equal(weights[held], dense[held])
    assert plan.sparsity[held] == 0
    assert plan.costs["sparsity"] < 0.5


def test_the_pattern_is_in_the_text_where_there_is_one():
    recipe = Recipe.of({"unit": "weights", "sparsity": 0.5, "metric": {"name": "magnitude", "group_size": 4}})
    assert "| metric magnitude; comparison=output; group_size=4 |" in recipe.text
    assert Recipe.parse(recipe.text) == recipe
    without = Recipe.of(
        {"unit": "weights", "sparsity": 0.5, "metric": {"name": "magnitude", "group_size": 0}}
    )
    assert "group_size" not in without.text


@pytest.mark.parametrize(
    ("metric", "changes", "message"),
    [
        ({"name": "wanda", "group_size": 4}, {"sparsity": 0.6}, "in each 4 weights, .*got 0.6. Take 0.5, or"),
        ({"name": "wanda", "group_size": 4}, {"sparsity": 0.05}, "got 0.05. Take 0.25, or another size"),
        ({"name": "wanda", "group_size": 1}, {}, "`metric.group_size` to be 0 or a whole number >= 2, got 1"),
        ({"name": "wanda", "group_size": 4}, {"allocation": "owl"}, "the rule uniform .*got owl"),
        (
            {"name": "wanda", "group_size": 4},
            {"allocation": {"rule": "uniform", "skip_first": 0.5}},
            "the rule uniform for all blocks .*got allocation.skip_first",
        ),
        (
            {"name": "sparsellm", "group_size": 4},
            {},
            "`metric.group_size` 0 with the metric sparsellm, got 4",
        ),
        ({"name": "maskllm", "group_size": 8}, {}, "`metric.group_size` of 4 with the metric maskllm, got 8"),
        ({"name": "wanda", "group_size": 4, "unit": "structure"}, {}, "got `metric.unit`"),
    ],
)
def test_patterns_that_cannot_be_are_named(metric, changes, message):
    form = {"unit": "weights", "sparsity": 0.5, "metric": metric}
    with pytest.raises(ValueError, match=message):
        completed(form | changes)


def test_a_size_that_does_not_divide_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    context = small_context(tmp_path, 1)
    monkeypatch.setattr(type(context), "sample", None)
    of = config({"name": "wanda", "group_size": 5}, 0.4, schedule={"before": STEP})
    with pytest.raises(
        ValueError, match=r"`group_size` to divide the number of inputs, got 5 for 32 at model"
    ):
        plan_weights(context, of)
    with pytest.raises(ValueError, match=r"got 5 for 32 at model"):
        check_recipe(of, context.anatomy)
    protect = ["*.self_attn.*", "*.gate_proj", "*.up_proj"]
    with pytest.raises(ValueError, match=r"got 5 for \d+ at model.layers.0.mlp.down_proj"):
        check_recipe(of, context.anatomy, protect)
