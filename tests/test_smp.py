"""Static Model Pruning: its formulas by hand, its training, recipes, kills and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.pruners.learned import smp as module
from secateur.pruners.learned.smp import kept_mask, kept_share, layer_shares, smp
from secateur.pruners.learned.training import DivergedError, MaskTrainer
from secateur.pruners.models import memory
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.recipes.allocation.layers import BudgetError
from secateur.pruners.recipes.plan import LiveBlock
from secateur.pruners.recipes.weights import plan_weights
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.known import KNOWN
from tests.mixtures import make_mixture
from tests.models import random_tokens, small_anatomy
from tests.recipe_contexts import CALIBRATION, small_context

TOKENS = random_tokens(4, 24)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 30)


def test_the_highest_scores_are_kept_and_the_gradient_of_the_mask_is_the_scores():
    scores = torch.tensor([[0.3, -1.0, 0.2], [2.0, 0.1, -0.5]], requires_grad=True)
    assert kept_mask(scores, 3).tolist() == [[1, 0, 1], [1, 0, 0]]
    anatomy = small_anatomy()
    linear = next(iter(anatomy.linears))
    training = module.Scores(anatomy, TOKENS, [linear], {linear.name: 0.5})
    found = training.mask(linear, 0.25)
    assert float(found.detach().sum()) == linear.n_weights // 4
    factors = torch.randn(found.shape)
    (found * factors).sum().backward()
    assert torch.equal(training.scores[linear.name].grad, factors)


def test_the_kept_share_falls_along_a_cube():
    assert [kept_share(0.4, part) for part in (0.0, 0.5, 1.0, 3.0)] == pytest.approx(
        [1, 0.4 + 0.6 / 8, 0.4, 0.4]
    )


def test_layers_of_a_role_share_in_proportion_to_their_mean_sigmoid():
    anatomy = small_anatomy(n_layers=3)
    linears = list(anatomy.linears)
    scores = {x.name: torch.full(x.weight.shape, 0.5 * x.block) for x in linears}
    found = layer_shares(linears, scores, 0.4, 2.0)
    means = [1 / (1 + math.exp(-0.25 * block)) for block in range(3)]
    for x in linears:
        assert found[x.name] == pytest.approx(3 * 0.4 * means[x.block] / sum(means))
    high = {x.name: torch.full(x.weight.shape, 9.0 if x.block else -9.0) for x in linears}
    assert max(layer_shares(linears, high, 0.9, 1.0).values()) == 1.0


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_the_budget_is_met_weights_are_as_they_were_and_the_model_is_left_dense(sparsity):
    anatomy = small_anatomy(n_layers=3)
    before = {x.name: x.weight.clone() for x in anatomy.linears}
    found = smp(anatomy, TOKENS, sparsity)
    zeros = sum(int((weight == 0).sum()) for weight in found.values())
    assert zeros / sum(weight.numel() for weight in before.values()) == pytest.approx(sparsity, abs=1e-4)
    for x in anatomy.linears:
        assert torch.equal(x.weight, before[x.name])
        kept = found[x.name] != 0
        assert torch.equal(found[x.name][kept], before[x.name][kept])
        assert "forward" not in vars(x.module)


def test_of_given_shares_each_layer_has_its_own():
    anatomy = small_anatomy(n_layers=2)
    first, second, *_ = anatomy.linears
    found = smp(anatomy, TOKENS, {first.name: 0.25, second.name: 0.5})
    assert set(found) == {first.name, second.name}
    assert int((found[first.name] == 0).sum()) == first.n_weights // 4
    assert int((found[second.name] == 0).sum()) == second.n_weights // 2


def test_the_loss_falls_below_that_of_magnitude_and_wanda(tmp_path, monkeypatch):
    """On the calibration windows, at the same sparsity."""
    monkeypatch.setattr(module, "FEWEST_STEPS", 120)
    losses = {}
    for name in ("smp", "smp_local", "magnitude", "wanda"):
        context = small_context(tmp_path, 2)
        form = {"unit": "weights", "sparsity": 0.5, "calibration": CALIBRATION, **KNOWN[name].form}
        plan = plan_weights(context, completed(form))
        for block in context.anatomy.blocks:
            plan.change(LiveBlock(block))
        zeros = sum(int((x.weight == 0).sum()) for x in context.anatomy.linears)
        assert zeros / sum(x.n_weights for x in context.anatomy.linears) == pytest.approx(0.5, abs=1e-3)
        with torch.no_grad():
            losses[name] = float(
                ce_loss(context.anatomy, context.sample(completed(form)["calibration"]).tokens)
            )
    assert max(losses["smp"], losses["smp_local"]) < min(losses["magnitude"], losses["wanda"]) - 0.5


def test_a_recipe_goes_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(MaskTrainer, "SAVE_SECONDS", 0.0)
    config = completed({"unit": "weights", "sparsity": 0.5, "calibration": CALIBRATION, **KNOWN["smp"].form})

    def weights(directory):
        context = small_context(directory, 2)
        plan = plan_weights(context, config)
        for block in context.anatomy.blocks:
            plan.change(LiveBlock(block))
        return [x.weight for x in context.anatomy.linears]

    whole = weights(tmp_path / "whole")
    take, taken = MaskTrainer.take_step, []

    def killed(self):
        taken.append(self.step)
        if len(taken) == 22:
            raise KeyboardInterrupt
        take(self)

    monkeypatch.setattr(MaskTrainer, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "killed")
    again = weights(tmp_path / "killed")
    assert taken == [*range(22), *range(21, 30)]
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    weights(tmp_path / "killed")  # trained before: no step is taken
    assert len(taken) == 31


def test_protected_projections_stay_dense_and_the_others_lose_more():
    anatomy = small_anatomy(n_layers=2)
    names = [x.name for x in anatomy.blocks[0].linears]
    found = smp(anatomy, TOKENS, 0.3, protected=names)
    assert not set(found) & set(names)
    zeros = sum(int((weight == 0).sum()) for weight in found.values())
    assert zeros / sum(x.n_weights for x in anatomy.linears) == pytest.approx(0.3, abs=1e-4)
    with pytest.raises(BudgetError):
        smp(anatomy, TOKENS, 0.6, protected=names)


@pytest.mark.parametrize("name", ["mixtral", "llama4_text"])
def test_experts_of_a_mixture_lose_weights_too(name, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 6)
    anatomy = dissect(make_mixture(name))
    before = {x.name: x.weight.clone() for x in anatomy.linears}
    found = smp(anatomy, TOKENS, 0.3)
    zeros = {name: int((weight == 0).sum()) for name, weight in found.items()}
    assert sum(zeros.values()) / sum(x.n_weights for x in anatomy.linears) == pytest.approx(0.3, abs=1e-4)
    assert all(0 < zeros[x.name] < x.n_weights for x in anatomy.linears if x.expert is not None)
    assert all(torch.equal(x.weight, before[x.name]) for x in anatomy.linears)


def test_it_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(module, "MaskTrainer", None)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    with pytest.raises(ValueError, match="GB of memory for the training of the metric smp"):
        smp(small_anatomy(), TOKENS, 0.3)


def test_a_training_that_diverges_is_one_line(monkeypatch):
    monkeypatch.setattr(module, "ce_loss", lambda anatomy, tokens: torch.tensor(math.inf))
    with pytest.raises(
        DivergedError, match=r"finite losses of the scores of the metric smp, .* step 0 of 30"
    ):
        smp(small_anatomy(n_layers=1), TOKENS, 0.3)
