"""LoRAPrune: its formulas against slow readable forms, its tuning, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.learned import loraprune as module
from secateur.pruners.learned.loraprune import loraprune, share_gone, unit_importance
from secateur.pruners.learned.low_rank import LowRank, TunedSublayer
from secateur.pruners.learned.masked_weights import replaced_forwards
from secateur.pruners.models.cutting import Piece
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.recipes.allocation.layers import BudgetError
from secateur.pruners.recipes.plan import DENSE, LiveBlock
from secateur.pruners.recipes.units import plan_units
from secateur.spaces.recipe.form import completed
from tests.models import random_tokens, small_anatomy
from tests.recipe_contexts import CALIBRATION, small_context

TOKENS = random_tokens(4, 24)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 30)


def gradients(anatomy, sublayers):
    """Backward pass of the loss through the updates of these sub-layers, all units kept."""
    outputs = {}
    for one in sublayers:
        outputs |= one.outputs(torch.ones(one.part.n_units))
    with replaced_forwards(list(anatomy.linears), outputs):
        ce_loss(anatomy, TOKENS).backward()


def tuned(anatomy, seed=0):
    """Sub-layers whose updates are not zero."""
    found = [TunedSublayer(part, 4, 0) for x in find_layouts(anatomy) for part in x.sublayers]
    generator = torch.Generator().manual_seed(seed)
    for one in found:
        for update in one.updates.values():
            update.left.data.normal_(0, 0.05, generator=generator)
    return found


def test_an_update_computes_with_the_merged_weight_and_has_its_gradient():
    linear = next(small_anatomy().linears)
    update = LowRank(linear, 4, seed=0)
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(1))
    assert torch.equal(update.outputs(x), F.linear(x, linear.weight, linear.bias))
    update.left.data.normal_(generator=torch.Generator().manual_seed(2))
    merged = linear.weight + 2.0 * update.left.detach() @ update.right.detach()
    assert torch.allclose(update.weight, merged)
    assert torch.allclose(update.outputs(x), F.linear(x, merged, linear.bias), atol=1e-5)
    update.outputs(x).square().sum().backward()
    whole = merged.clone().requires_grad_()
    F.linear(x, whole, linear.bias).square().sum().backward()
    assert torch.allclose(update.left.grad, 2.0 * whole.grad @ update.right.detach().T, rtol=1e-3)


def test_the_gradient_of_the_updates_is_the_change_of_their_product_in_a_step():
    linear = next(small_anatomy().linears)
    update = LowRank(linear, 3, seed=0)
    generator = torch.Generator().manual_seed(3)
    for factor in (update.left, update.right):
        factor.data.normal_(generator=generator)
        factor.grad = torch.randn(factor.shape, generator=generator)
    after = (update.left - update.left.grad) @ (update.right - update.right.grad)
    assert torch.allclose(update.gradient, update.left @ update.right - after, atol=1e-5)


def test_the_importance_of_units_by_loops():
    """Importance of units: sums of |(dB A + B dA - dB dA) (W + 2 B A)|, normalised in each projection, added up."""
    anatomy = small_anatomy(n_layers=1)
    attention, mlp = tuned(anatomy)
    gradients(anatomy, [attention, mlp])

    def of_weight(update, i, j):
        rank = range(len(update.right))
        b, a, db, da = (
            x.tolist()
            for x in (update.left[i], update.right[:, j], update.left.grad[i], update.right.grad[:, j])
        )
        gradient = sum(db[r] * a[r] + b[r] * da[r] - db[r] * da[r] for r in rank)
        return abs(gradient * (float(update.linear.weight[i, j]) + 2 * sum(b[r] * a[r] for r in rank)))

    def over_norm(sums):
        return [x / (math.sqrt(sum(y * y for y in sums)) + 1e-8) for x in sums]

    expected = torch.zeros(2)
    for update in attention.updates.values():
        linear = update.linear
        n_out, n_in = linear.weight.shape
        sums = [0.0, 0.0]
        for i in range(n_out):
            for j in range(n_in):
                group = (j if linear.role == "o" else i) * 2 // (n_in if linear.role == "o" else n_out)
                sums[group] += of_weight(update, i, j)
        expected += torch.tensor(over_norm(sums))
    assert unit_importance(attention).tolist() == pytest.approx(expected.tolist(), rel=1e-3)

    unit = 5
    parts = []
    for update in mlp.updates.values():
        scores = (update.gradient * update.weight).abs()
        sums = scores.sum(0 if update.linear.role == "down" else 1)
        parts.append(float(sums[unit] / (sums.square().sum().sqrt() + 1e-8)))
    assert float(unit_importance(mlp)[unit]) == pytest.approx(sum(parts), rel=1e-4)


def test_gates_on_the_output_projection_remove_units():
    anatomy = small_anatomy(n_layers=1)
    sublayers = tuned(anatomy)
    kept = {"attention": (1,), "mlp": tuple(range(0, 48, 3))}
    outputs, cut = {}, {}
    for one in sublayers:
        gates = torch.zeros(one.part.n_units)
        gates[list(kept[one.part.kind])] = 1
        outputs |= one.outputs(gates)
        cut |= one.cut(kept[one.part.kind])
    with torch.no_grad(), replaced_forwards(list(anatomy.linears), outputs):
        expected = anatomy.model(input_ids=TOKENS).logits
    live = LiveBlock(anatomy.blocks[0], find_layouts(anatomy)[0])
    for kind, sublayer in live.sublayers.items():
        part = next(one.part for one in sublayers if one.part.kind == kind)
        pieces = {x.linear.name: cut[x.linear.name] for x in part.placements}
        sublayer.cut(len(kept[kind]), {name: Piece(weight, None) for name, weight in pieces.items()})
    with torch.no_grad():
        found = anatomy.model(input_ids=TOKENS).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_schedule_is_a_cubic_between_flat_ends():
    n_steps = 200
    found = [share_gone(step, n_steps) for step in range(n_steps)]
    for step, share in enumerate(found):
        if step <= 20:
            expected = 0.0
        elif step > 180:
            expected = 1.0
        else:
            expected = 1 - (1 - (step - 20) / 160) ** 3
        assert share == pytest.approx(expected)
    assert found == sorted(found)


def test_units_go_in_steps_and_for_good(monkeypatch):
    anatomy = small_anatomy(n_layers=2)
    gone, prune = [], module.Tuning.prune

    def noted(self, name, n_gone):
        prune(self, name, n_gone)
        gone.append((name, frozenset((self.gates[name] == 0).nonzero().flatten().tolist())))

    monkeypatch.setattr(module.Tuning, "prune", noted)
    units, _ = loraprune(anatomy, find_layouts(anatomy), TOKENS, 0.3)
    mlp = [at for name, at in gone if "mlp" in name]
    assert len(mlp) == 6  # at steps 0, 10, 20, and in the last three
    assert all(before <= after for before, after in pairwise(mlp))
    assert mlp[-1] == set(range(48)) - set(units[0]["mlp"])
    total = 48 - len(units[0]["mlp"])
    assert [len(at) for at in mlp[:3]] == [math.floor(total * share_gone(step, 30)) for step in (0, 10, 20)]


def test_the_last_block_and_the_first_tenth_stay_whole():
    anatomy = small_anatomy(n_layers=11)
    units, weights = loraprune(anatomy, find_layouts(anatomy), TOKENS, 0.2)
    whole = [index for index, block in enumerate(units) if len(block["mlp"]) == 48]
    assert whole == [0, 10]
    assert set(weights) == {x.name for x in anatomy.linears}  # all are tuned
    with pytest.raises(BudgetError):
        loraprune(small_anatomy(n_layers=2), find_layouts(small_anatomy(n_layers=2)), TOKENS, 0.7)


def test_a_model_of_one_block_which_would_stay_whole_is_refused():
    with pytest.raises(ValueError, match=r"a model of more than 1 block for the metric loraprune, .* got 1"):
        module.check(small_anatomy(n_layers=1))


def test_the_least_important_units_go_and_tuning_lowers_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 120)
    monkeypatch.setattr(module, "RATE", 1e-2)
    context = small_context(tmp_path, 3)
    tokens = context.sample(
        completed({"unit": "structure", "sparsity": 0.2, "calibration": CALIBRATION})["calibration"]
    ).tokens
    losses, plans = {}, {}
    ends = {"rule": "uniform", "skip_first": 0.0, "skip_last": 0.34}
    for metric, rule in (("loraprune", "global"), ("wanda_sp", ends)):
        form = {"unit": "structure", "sparsity": 0.2, "calibration": CALIBRATION, "metric": metric}
        plan = plans[metric] = plan_units(context, completed(form | {"allocation": rule}))
        live = [LiveBlock(block, x) for block, x in zip(context.anatomy.blocks, context.layouts, strict=True)]
        for one in live:
            plan.change(one)
        with torch.no_grad():
            losses[metric] = float(ce_loss(context.anatomy, tokens))
        for one in live:
            one.restore()
    shapes = [[{k: len(u) for k, u in kept.items()} for kept in plan.numbers] for plan in plans.values()]
    assert shapes[0] == shapes[1]
    assert losses["loraprune"] < losses["wanda_sp"] - 0.3
    assert all(key != DENSE for key in plans["loraprune"].keys)  # the whole block is tuned, too
    assert plans["wanda_sp"].keys[-1] == DENSE
