"""Compresso: its formulas against slow readable forms, and what its training learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from secateur.pruners.calibration.prompts import COLLABORATIVE
from secateur.pruners.learned import compresso as module
from secateur.pruners.learned.compresso import compresso, expected_sparsity
from secateur.pruners.learned.hard_concrete import augmented_lagrangian, final_gates
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.recipes.units import plan_units
from secateur.search import app
from secateur.search.app.recipe_file import open_recipe
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.form import completed
from tests.models import random_tokens, small_anatomy
from tests.recipe_contexts import CALIBRATION, small_context

TOKENS = random_tokens(4, 24)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_expected_sparsity_and_its_penalty_by_hand():
    locations = [torch.tensor([0.3, -1.0]), torch.tensor([2.0])]
    gone = [[sigmoid(math.log(0.1 / 1.1) * 2 / 3 - a) for a in x.tolist()] for x in locations]
    expected = (sum(gone[0]) * 10 + sum(gone[1]) * 30) / 100
    found = expected_sparsity(locations, [10, 30], 100)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    penalty = augmented_lagrangian(found - 0.4, torch.tensor([0.5, 3.0]))
    assert float(penalty) == pytest.approx(0.5 * (expected - 0.4) + 3 * (expected - 0.4) ** 2, rel=1e-4)


def training(anatomy, monkeypatch, steps, sparsity=0.3):
    """The gates after a training, as `compresso` makes it."""
    monkeypatch.setattr(module, "FEWEST_STEPS", steps)
    held, train = [], module.BudgetGates.train
    monkeypatch.setattr(
        module.BudgetGates, "train", lambda self, state: (held.append(self), train(self, state))
    )
    units, weights = compresso(anatomy, find_layouts(anatomy), TOKENS, sparsity)
    return held[0], units, weights


def test_the_budget_rises_behind_the_tuning_and_the_gates_follow_it(monkeypatch):
    sparsities, penalty = [], module.BudgetGates.penalty

    def noted(self, part):
        found = penalty(self, part)
        sizes = [x.unit_params for x in self.gated]
        locations = [self.locations[x.name].detach() for x in self.gated]
        sparsities.append(
            (min(1.0, part) * self.sparsity, float(expected_sparsity(locations, sizes, self.n_params)))
        )
        return found

    monkeypatch.setattr(module.BudgetGates, "penalty", noted)
    training(small_anatomy(n_layers=2), monkeypatch, 400)
    assert len(sparsities) == 350  # the first eighth has no gates
    assert sparsities[0][0] == 0
    assert [target for target, _ in sparsities[200:]] == pytest.approx([0.3] * 150)
    assert sparsities[-1][1] == pytest.approx(0.3, abs=0.05)


def test_the_lowest_gates_go_and_the_others_are_multiplied_into_the_weights(monkeypatch):
    anatomy = small_anatomy(n_layers=2)
    gates, units, weights = training(anatomy, monkeypatch, 60)
    for one in gates.sublayers:
        part = one.part
        locations = gates.locations[part.name].detach()
        kept = list(units[part.output.block][part.kind])
        gone = sorted(set(range(part.n_units)) - set(kept))
        if gone and kept:
            assert locations[kept].min() >= locations[gone].max()
        values = final_gates(locations).repeat_interleave(part.unit_width)
        columns = torch.cat([torch.arange(n * part.unit_width, (n + 1) * part.unit_width) for n in kept])
        expected = (part.output.weight * values)[:, columns]  # the output projection has no update
        assert torch.allclose(weights[part.output.name], expected)


def test_queries_and_values_alone_are_updated(monkeypatch):
    anatomy = small_anatomy(n_layers=1)
    gates, units, weights = training(anatomy, monkeypatch, 60, sparsity=0.1)
    assert {x for one in gates.sublayers for x in one.updates} == {
        f"model.layers.0.self_attn.{x}" for x in ("q_proj", "v_proj")
    }
    (query,) = [x for x in anatomy.linears if x.role == "q"]
    (key,) = [x for x in anatomy.linears if x.role == "k"]
    assert len(units[0]["attention"]) == 2
    assert not torch.equal(weights[query.name], query.weight)
    assert torch.equal(weights[key.name], key.weight)


def test_sublayers_share_the_loss_as_their_gates_expect(monkeypatch):
    """Gates of one MLP that nothing gains by begin low: it loses most."""
    anatomy = small_anatomy(n_layers=2)
    first = module.BudgetGates.first

    def low(self, part):
        locations = first(self, part)
        if part.output.block == 1 and part.kind == "mlp":
            locations.data.sub_(5.0)
        return locations

    monkeypatch.setattr(module.BudgetGates, "first", low)
    _, units, _ = training(anatomy, monkeypatch, 30, sparsity=0.2)
    assert len(units[1]["mlp"]) < len(units[0]["mlp"]) - 10


@pytest.mark.parametrize("bos", [None, 0])
def test_the_loss_behind_a_prompt_is_that_of_the_window_alone(bos):
    anatomy, prompt = replace(small_anatomy(n_layers=2), bos=bos), torch.tensor([5, 9, 2])
    rows = TOKENS.clone()
    if bos is not None:
        rows[:, 0] = bos
    found = module.behind_prompt(anatomy, rows, prompt)
    losses = []
    for row in rows:
        own = row.tolist()
        seen = [*own[:1], 5, 9, 2, *own[1:]] if bos is not None else [5, 9, 2, *own]
        with torch.no_grad():
            logits = anatomy.model(input_ids=torch.tensor([seen])).logits[0].log_softmax(-1)
        first = 1 if bos is None else 2  # token of the window that is predicted first
        losses += [-float(logits[place + 3 - 1, own[place]]) for place in range(first, len(own))]
    assert float(found) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(module.behind_prompt(anatomy, rows, prompt[:0])) == float(ce_loss(anatomy, rows))


def test_a_prompt_is_told_by_the_recipe_and_changes_what_is_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 12)
    context = replace(small_context(tmp_path, 2), prompts={"collaborative": (3, 1, 4, 1, 5)})
    form = {"unit": "structure", "sparsity": 0.25, "calibration": CALIBRATION, "allocation": "global"}
    plain, prompted = (
        completed(form | {"metric": {"name": "compresso", **more}})
        for more in ({}, {"prompt": "collaborative"})
    )
    assert "prompt" not in Recipe.of(plain).text
    assert "| metric compresso; prompt=collaborative |" in Recipe.of(prompted).text
    plans = [plan_units(context, one) for one in (plain, prompted)]
    assert plans[0].keys != plans[1].keys
    shared = plans[0].outputs.keys() & plans[1].outputs.keys()
    assert any(not torch.equal(plans[0].outputs[name], plans[1].outputs[name]) for name in shared)


@pytest.mark.usefixtures("forked_reload")
def test_the_prompt_reaches_the_training_by_the_models_own_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 1)
    monkeypatch.setattr(module, "PASSES", 1)
    seen, loss = [], module.behind_prompt
    monkeypatch.setattr(
        module,
        "behind_prompt",
        lambda anatomy, rows, prompt: (seen.append(prompt), loss(anatomy, rows, prompt))[1],
    )
    recipe = {
        "unit": "structure",
        "sparsity": 0.3,
        "calibration": {"sources": {"calibration": 1}, "samples": 4, "length": 32},
        "metric": {"name": "compresso", "prompt": "collaborative"},
        "allocation": "global",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({"recipe": recipe, "sources": {"calibration": "docs"}, "pool_tokens": 256})
    )
    app.prune(open_recipe(str(file)), "tiny", tmp_path / "out", tokens=128, window=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(seen[0]) == COLLABORATIVE
