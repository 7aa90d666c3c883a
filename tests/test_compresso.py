"""Compresso: its formulas against slow readable forms, and what its training learns."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.pruners.learned import compresso as module
from secateur.pruners.learned.compresso import compresso, expected_sparsity
from secateur.pruners.learned.hard_concrete import augmented_lagrangian, final_gates
from secateur.pruners.models.find_layout import find_layouts
from tests.models import random_tokens, small_anatomy

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
