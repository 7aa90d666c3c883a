"""Sheared LLaMA: its formulas against slow readable forms, its training, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.pruners.learned import sheared as module
from secateur.pruners.learned.gates import lagrangian
from secateur.pruners.learned.hard_concrete import expected_kept, final_gates, sampled_gates
from secateur.pruners.learned.sheared import sheared
from secateur.pruners.learned.training import DivergedError, MaskTrainer
from secateur.pruners.models import memory
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.recipes.plan import LiveBlock
from secateur.pruners.recipes.units import plan_units
from secateur.spaces.recipe.form import completed
from tests.models import random_tokens, small_anatomy
from tests.recipe_contexts import CALIBRATION, small_context

TOKENS = random_tokens(4, 24)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 30)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_gates_are_those_of_the_slow_form():
    log_alpha = torch.tensor([-3.0, 0.0, 0.5, 4.0])
    found = sampled_gates(log_alpha, torch.Generator().manual_seed(1)).tolist()
    drawn = torch.rand(4, generator=torch.Generator().manual_seed(1)).tolist()
    for z, a, r in zip(found, log_alpha.tolist(), drawn, strict=True):
        u = 1e-6 + (1 - 2e-6) * r
        stretched = sigmoid((math.log(u / (1 - u)) + a) / (2 / 3)) * 1.2 - 0.1
        assert z == pytest.approx(min(1, max(0, stretched)), abs=1e-5)
    ends = final_gates(log_alpha).tolist()
    assert ends == pytest.approx([sigmoid(a * 1.5 * 0.8) for a in log_alpha.tolist()])


@pytest.mark.parametrize("location", [-2.0, 0.0, 1.5])
def test_the_expected_number_is_that_of_many_draws(location):
    gates = sampled_gates(torch.full((100_000,), location), torch.Generator().manual_seed(2))
    assert float((gates > 0).float().mean()) == pytest.approx(
        float(expected_kept(torch.tensor([location]))), abs=0.01
    )


def test_the_lagrangian_by_hand():
    log_alpha = torch.tensor([0.3, -1.0])
    kept = [1 - sigmoid(math.log(0.1 / 1.1) * 2 / 3 - a) for a in (0.3, -1.0)]
    missing = 1 - sum(kept) / 2 - 0.4
    found = lagrangian(log_alpha, 0.4, torch.tensor([2.0, 3.0]))
    assert float(found) == pytest.approx(2 * missing + 3 * missing**2, rel=1e-5)


def n_params(anatomy, units):
    total = gone = 0
    for layout, kept in zip(find_layouts(anatomy), units, strict=True):
        for part in layout.sublayers:
            total += part.n_units * part.unit_params + part.fixed_params
            gone += (part.n_units - len(kept[part.kind])) * part.unit_params
    return gone / total


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_the_target_shape_is_met_within_a_unit_and_the_model_is_left_dense(sparsity):
    anatomy = small_anatomy(n_layers=3)
    before = [x.weight.clone() for x in anatomy.linears]
    layouts = find_layouts(anatomy)
    units, weights, _ = sheared(anatomy, layouts, TOKENS, sparsity)
    assert n_params(anatomy, units) == pytest.approx(sparsity, abs=0.01)
    assert {len(kept["mlp"]) for kept in units} <= set(range(48))
    assert max(len(kept["mlp"]) for kept in units) - min(len(kept["mlp"]) for kept in units) <= 2
    for layout, kept in zip(layouts, units, strict=True):
        down = layout.mlp.output
        assert weights[down.name].shape == (32, len(kept["mlp"]))
        change = (weights[down.name] / down.weight[:, list(kept["mlp"])] - 1).abs()
        assert 0 < float(change.median()) < 1
    assert all(torch.equal(a, b.weight) for a, b in zip(before, anatomy.linears, strict=True))
    assert all("forward" not in vars(x.module) for x in anatomy.linears)


def test_the_loss_is_lower_than_without_training(tmp_path, monkeypatch):
    """On the calibration windows, at equal shapes."""
    monkeypatch.setattr(module, "FEWEST_STEPS", 150)
    context = small_context(tmp_path, 2)
    tokens = context.sample(
        completed({"unit": "structure", "sparsity": 0.3, "calibration": CALIBRATION})["calibration"]
    )
    losses, shapes = {}, {}
    for metric, rule in (("sheared", "global"), ("wanda_sp", "uniform"), ("flap", "uniform")):
        form = {"unit": "structure", "sparsity": 0.3, "calibration": CALIBRATION, "metric": metric}
        plan = plan_units(context, completed(form | {"allocation": rule}))
        shapes[metric] = [{kind: len(units) for kind, units in kept.items()} for kept in plan.numbers]
        live = [LiveBlock(block, x) for block, x in zip(context.anatomy.blocks, context.layouts, strict=True)]
        for one in live:
            plan.change(one)
        with torch.no_grad():
            losses[metric] = float(ce_loss(context.anatomy, tokens.tokens))
        for one in live:
            one.restore()
    assert shapes["sheared"] == shapes["wanda_sp"] == shapes["flap"]
    assert losses["sheared"] < min(losses["wanda_sp"], losses["flap"]) - 0.05


def test_protected_sublayers_are_whole_and_not_trained():
    anatomy = small_anatomy(n_layers=2)
    names = [x.name for x in anatomy.blocks[0].linears]
    units, weights, _ = sheared(anatomy, find_layouts(anatomy), TOKENS, 0.2, protected=names)
    assert (len(units[0]["attention"]), len(units[0]["mlp"])) == (2, 48)
    assert not set(names) & set(weights)
    assert len(units[1]["mlp"]) < 48


def test_a_recipe_applies_the_trained_weights_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(MaskTrainer, "SAVE_SECONDS", 0.0)
    form = {"unit": "structure", "sparsity": 0.3, "calibration": CALIBRATION, "metric": "sheared"}
    config = completed(form | {"allocation": "global"})

    def logits(directory):
        context = small_context(directory, 2)
        plan = plan_units(context, config)
        for block, layout in zip(context.anatomy.blocks, context.layouts, strict=True):
            plan.change(LiveBlock(block, layout))
        return plan, context.anatomy.model(input_ids=TOKENS).logits

    plan, whole = logits(tmp_path / "whole")
    assert plan.costs["sparsity"] == pytest.approx(0.3, abs=0.01)
    loss, taken = module.Shearing.loss, []

    def killed(self, step):
        taken.append(step)
        if len(taken) == 12:
            raise KeyboardInterrupt
        return loss(self, step)

    monkeypatch.setattr(module.Shearing, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        logits(tmp_path / "killed")
    again, found = logits(tmp_path / "killed")
    assert taken == [*range(12), *range(11, 30)]
    assert again.numbers == plan.numbers
    assert torch.equal(found, whole)
    assert again.keys == plan.keys
    logits(tmp_path / "killed")  # trained before: no step is taken
    assert len(taken) == 31


def test_it_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(module, "MaskTrainer", None)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    anatomy = small_anatomy()
    with pytest.raises(ValueError, match="GB of memory for the training of the metric sheared"):
        sheared(anatomy, find_layouts(anatomy), TOKENS, 0.3)


def test_a_training_that_diverges_is_one_line(monkeypatch):
    monkeypatch.setattr(module, "ce_loss", lambda anatomy, tokens: torch.tensor(math.inf))
    anatomy = small_anatomy(n_layers=1)
    with pytest.raises(
        DivergedError, match=r"finite losses of the gates of the metric sheared, .* step 0 of 30"
    ):
        sheared(anatomy, find_layouts(anatomy), TOKENS, 0.3)
