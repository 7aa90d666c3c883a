"""Learned thresholds: the mask and its gradient against a slow form, and what the training learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from secateur.pruners.learned import learned_threshold as module
from secateur.pruners.learned.learned_threshold import (
    TEMPERATURE,
    Threshold,
    learned_threshold,
    mean_threshold,
    shares_below,
)
from secateur.pruners.learned.training import DivergedError, MaskTrainer
from secateur.pruners.models import memory
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.recipes.allocation.layers import BudgetError, Layer, RuleEvidence
from secateur.pruners.recipes.units import plan_units
from secateur.pruners.structure.knowledge import unit_layer
from secateur.spaces.recipe.form import completed
from tests.mixtures import MIXTURES, make_mixture
from tests.models import small_anatomy
from tests.recipe_contexts import CALIBRATION, small_context
from tests.test_besa import sample_of

FORM = {
    "unit": "structure",
    "sparsity": 0.3,
    "calibration": CALIBRATION,
    "metric": "wanda_sp",
    "allocation": "learned_threshold",
}


def layers_of(anatomy, protected=()):
    """Sub-layers with random scores, as a metric would give them."""
    generator = torch.Generator().manual_seed(3)
    parts = [part for layout in find_layouts(anatomy, experts=True) for part in layout.sublayers]
    found = []
    for part in parts:
        layer = unit_layer(part, torch.rand(part.n_units, generator=generator), protected)
        found.append(Layer(**{**vars(layer), "linears": tuple(x.linear.name for x in part.placements)}))
    return found


def test_the_mask_and_its_gradient_are_those_of_the_slow_form():
    scores = np.array([5.0, -1.0, 3.0, 2.0, 9.0])
    one = Threshold(Layer(0, "mlp", 3, 5, scores, keep=1), torch.device("cpu"))
    assert one.most == pytest.approx(4 / 5)
    with torch.no_grad():
        one.value.fill_(0.45)
    upper = [0.3, -1.0, 2.0, 0.7, 0.1]
    mask = one.mask()
    slope, expected = 0.0, []
    for score, up in zip(scores, upper, strict=True):
        place = (sum(other < score for other in scores) + 0.5) / 5
        expected.append(float(place >= 0.45))
        soft = 1 / (1 + math.exp(-(place - 0.45) / TEMPERATURE))
        slope -= up * soft * (1 - soft) / TEMPERATURE
    assert mask.tolist() == pytest.approx(expected, abs=1e-6)
    (found,) = torch.autograd.grad((mask * torch.tensor(upper)).sum(), one.value)
    assert float(found) == pytest.approx(slope, rel=1e-5)


def test_the_mean_is_by_parameters_and_removes_that_share():
    one, other = (
        Threshold(Layer(0, "mlp", size, 10, np.arange(10.0)), torch.device("cpu")) for size in (1, 3)
    )
    with torch.no_grad():
        one.value.fill_(0.2)
        other.value.fill_(0.6)
    assert float(mean_threshold([one, other]).detach()) == pytest.approx((10 * 0.2 + 30 * 0.6) / 40)
    gone = [10 - int(x.mask().sum()) for x in (one, other)]
    assert gone == [2, 6]


def test_layers_that_the_loss_does_not_need_lose_more(tmp_path):
    """The output of one MLP is next to nothing."""
    anatomy = small_anatomy(n_layers=2)
    next(x for x in anatomy.blocks[1].linears if x.role == "down").weight.mul_(1e-3)
    layers = layers_of(anatomy)
    before = [x.weight.clone() for x in anatomy.linears]
    shares = shares_below(anatomy, sample_of(anatomy, tmp_path), sparsity=0.3, layers=layers)
    assert shares[3] > shares[1] + 0.2
    weights = [x.n_weights for x in layers]
    assert np.average(shares, weights=weights) == pytest.approx(0.3, abs=0.05)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, anatomy.linears, strict=True))
    assert all("forward" not in vars(x.module) for x in anatomy.linears)
    gone = learned_threshold(layers, RuleEvidence(measured=shares), 0.3)
    removed = sum(x.removed(int(n)) for x, n in zip(layers, gone, strict=True))
    assert removed / sum(weights) == pytest.approx(0.3, abs=0.01)


def test_a_protected_layer_keeps_all_and_the_first_attention_a_group(tmp_path):
    anatomy = small_anatomy(n_layers=2)
    layers = layers_of(anatomy, protected=[x.name for x in anatomy.blocks[1].linears])
    shares = shares_below(anatomy, sample_of(anatomy, tmp_path), sparsity=0.4, layers=layers)
    assert shares[2:] == (0.0, 0.0)
    assert 0 < shares[0] <= 0.5
    whole = layers_of(anatomy, protected=[x.name for x in anatomy.linears])
    with pytest.raises(BudgetError):
        learned_threshold(whole, RuleEvidence(measured=(0.0,) * 4), 0.4)


def test_other_scores_are_learned_anew_and_equal_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 20)
    anatomy, taken, take = small_anatomy(n_layers=2), [], MaskTrainer.take_step
    monkeypatch.setattr(MaskTrainer, "take_step", lambda self: (taken.append(self.step), take(self)))
    sample, layers = sample_of(anatomy, tmp_path), layers_of(anatomy)
    first = shares_below(anatomy, sample, sparsity=0.3, layers=layers)
    assert shares_below(anatomy, sample, sparsity=0.3, layers=layers_of(anatomy)) == first
    assert len(taken) == 20
    turned = [Layer(**{**vars(x), "scores": -x.scores}) for x in layers]
    assert shares_below(anatomy, sample, sparsity=0.3, layers=turned) != first
    assert len(taken) == 40


def test_a_recipe_goes_on_after_a_kill_and_keeps_the_highest_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 30)
    monkeypatch.setattr(MaskTrainer, "SAVE_SECONDS", 0.0)
    whole = plan_units(small_context(tmp_path / "whole", 3), completed(FORM))
    assert whole.costs["sparsity"] == pytest.approx(0.3, abs=0.01)
    taken, take = [], MaskTrainer.take_step

    def killed(self):
        taken.append(self.step)
        if len(taken) == 12:
            raise KeyboardInterrupt
        take(self)

    monkeypatch.setattr(MaskTrainer, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        plan_units(small_context(tmp_path / "killed", 3), completed(FORM))
    context = small_context(tmp_path / "killed", 3)
    assert plan_units(context, completed(FORM)).numbers == whole.numbers
    assert taken == [*range(12), *range(11, 30)]
    plan_units(context, completed(FORM))  # from memory
    assert len(taken) == 31


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Expected no `schedule` with the rule learned_threshold"):
        completed(FORM | {"schedule": {"steps": 3}})
    with pytest.raises(
        ValueError, match="Expected the rule global and no `schedule` with the metric sheared"
    ):
        completed(FORM | {"metric": "sheared"})
    anatomy = small_anatomy(n_layers=2)
    sample, layers = sample_of(anatomy, tmp_path), layers_of(anatomy)
    with monkeypatch.context() as patch:
        patch.setattr(module, "ce_loss", lambda anatomy, tokens: ce_loss(anatomy, tokens) * math.inf)
        with pytest.raises(
            DivergedError, match="finite losses of the thresholds of the rule learned_threshold"
        ):
            shares_below(anatomy, sample, sparsity=0.3, layers=layers)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    with pytest.raises(ValueError, match="GB of memory for the training of the rule learned_threshold"):
        shares_below(anatomy, sample, sparsity=0.3, layers=layers)


def test_shared_experts_of_a_mixture_are_served(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 20)
    anatomy = dissect(make_mixture(next(name for name in MIXTURES if "qwen2" in name)))
    layers = layers_of(anatomy)
    shares = shares_below(anatomy, sample_of(anatomy, tmp_path), sparsity=0.2, layers=layers)
    assert len(shares) == len(layers)
    assert all(0 <= share <= x.n_free / x.n_units for share, x in zip(shares, layers, strict=True))
    assert max(shares) > 0
