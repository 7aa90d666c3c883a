"""MaskLLM: its formulas against slow readable forms, its training, and what it refuses."""

from __future__ import annotations

import math
import sys
from itertools import combinations

import pytest
import torch

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.collected import CalibrationStatistics
from secateur.pruners.calibration.gradients import collect_gradients, model_statistics
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.learned import maskllm
from secateur.pruners.learned.gumbel_choice import chosen_scores, gumbel_softmax, pattern_masks, sampled_mask
from secateur.pruners.learned.maskllm import learned_masks
from secateur.pruners.learned.training import DivergedError
from secateur.pruners.masks import mask
from secateur.pruners.models import memory
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.weights.method import LayerProblem, Method
from secateur.pruners.weights.sparsegpt import sparsegpt
from tests.mixtures import make_mixture
from tests.models import random_tokens, small_anatomy

TOKENS = random_tokens(6, 24)


def test_the_masks_of_a_pattern():
    masks = pattern_masks(2, 4)
    expected = [[float(i in kept) for i in range(4)] for kept in combinations(range(4), 2)]
    assert masks.tolist() == expected
    assert pattern_masks(1, 4).tolist() == torch.eye(4).tolist()


def test_the_soft_choice_is_that_of_the_slow_form():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    found = gumbel_softmax(logits, 0.7, torch.Generator().manual_seed(5))
    drawn = torch.empty(3, 6).exponential_(generator=torch.Generator().manual_seed(5))
    for i in range(3):
        parts = [math.exp((float(logits[i, j]) - math.log(float(drawn[i, j]))) / 0.7) for j in range(6)]
        assert found[i].tolist() == pytest.approx([x / sum(parts) for x in parts], rel=1e-4)
    masks = pattern_masks(2, 4)
    soft = sampled_mask(logits, masks, 0.7, torch.Generator().manual_seed(5))
    assert soft.sum(1).tolist() == pytest.approx([2.0] * 3)
    assert torch.allclose(soft[:, 0], found[:, :3].sum(1))


def test_choices_are_drawn_by_their_chances():
    """As the temperature falls the largest share is of each choice with its softmax chance."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5]).expand(20_000, 4)
    chosen = gumbel_softmax(logits, 0.05, torch.Generator().manual_seed(1)).argmax(1)
    found = torch.bincount(chosen, minlength=4) / len(chosen)
    assert found.tolist() == pytest.approx(logits[0].softmax(0).tolist(), abs=0.015)


def test_the_two_highest_scores_are_the_likeliest_mask():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) * 3
    masks = pattern_masks(2, 4)
    kept = mask(chosen_scores(logits, masks), 0.5, group_size=4)
    assert torch.equal(kept.float(), masks[logits.argmax(1)])


def loss_with(anatomy, masks):
    dense = [(linear, linear.weight) for linear in anatomy.linears]
    for linear, weight in dense:
        linear.point_to(weight * masks[linear.name])
    with torch.no_grad():
        found = float(ce_loss(anatomy, TOKENS))
    for linear, weight in dense:
        linear.point_to(weight)
    return found


def test_learned_masks_have_a_lower_loss_than_their_prior():
    anatomy = small_anatomy(n_layers=2)
    before = [x.weight.clone() for x in anatomy.linears]
    scores = learned_masks(anatomy, TOKENS)
    prior = {
        linear.name: sparsegpt(LayerProblem(linear.weight, part.inputs[linear.name], group_size=4), [0.5])[0]
        != 0
        for part in stream_blocks(anatomy, TOKENS, inputs="gram")
        for linear in part.block.linears
    }
    learned = {name: mask(score, 0.5, group_size=4) for name, score in scores.items()}
    assert loss_with(anatomy, learned) < loss_with(anatomy, prior) - 0.05
    assert all(torch.equal(a, b.weight) for a, b in zip(before, anatomy.linears, strict=True))


def test_the_first_mask_is_the_prior(monkeypatch):
    """Without steps the likeliest mask is SparseGPT's in all but few groups: three deviations of the noise."""
    monkeypatch.setattr(maskllm, "FEWEST_STEPS", 0)
    monkeypatch.setattr(maskllm, "PASSES", 0)
    anatomy = small_anatomy(n_layers=1)
    scores = learned_masks(anatomy, TOKENS)
    (part,) = stream_blocks(anatomy, TOKENS, inputs="gram")
    same = []
    for linear in part.block.linears:
        prior = sparsegpt(LayerProblem(linear.weight, part.inputs[linear.name], group_size=4), [0.5])[0] != 0
        same.append((mask(scores[linear.name], 0.5, group_size=4) == prior).float().mean())
    assert float(torch.stack(same).mean()) > 0.95


def test_the_metric_gives_the_learned_mask_and_meets_the_pattern():
    anatomy = small_anatomy(n_layers=1)
    whole = model_statistics(anatomy, TOKENS, gradients=("maskllm",))
    for linear in anatomy.linears:
        weight = Method("maskllm", group_size=4).weights(linear, None, [0.5], whole)[0]
        groups = (weight != 0).reshape(-1, 4).sum(1)
        assert set(groups.tolist()) == {2}
        assert torch.equal(weight != 0, whole.gradients["maskllm"][linear.name] >= 1)


def test_a_killed_training_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    anatomy = small_anatomy(n_layers=1)
    whole = learned_masks(anatomy, TOKENS)
    loss, taken = maskllm._Choices._loss, []

    def killed(self, step):
        if step == 40 and len(taken) == 40:
            raise KeyboardInterrupt
        taken.append(step)
        return loss(self, step)

    monkeypatch.setattr(maskllm._Choices, "_loss", killed)
    monkeypatch.setattr("secateur.pruners.learned.training.MaskTrainer.SAVE_SECONDS", 0.0)
    cache = StatisticsCache(tmp_path / "cache", sys.maxsize)

    def statistics():
        return CalibrationStatistics(anatomy, TOKENS, cache, "toy")

    with pytest.raises(KeyboardInterrupt):
        statistics().gradients(["maskllm"])
    taken.append(-1)
    again = statistics().gradients(["maskllm"])["maskllm"]
    assert taken[41:] == list(range(40, 100))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    path, taken[:] = tmp_path / "gradients.safetensors", []
    with pytest.raises(KeyboardInterrupt):
        model_statistics(anatomy, TOKENS, gradients=("maskllm",), path=path, identity="toy")
    assert [x.name for x in tmp_path.glob("gradients*")] == ["gradients-maskllm-training.safetensors"]
    taken.append(-1)
    found = model_statistics(anatomy, TOKENS, gradients=("maskllm",), path=path, identity="toy")
    assert taken[41:] == list(range(40, 100))
    assert all(torch.equal(found.gradients["maskllm"][name], whole[name]) for name in whole)
    assert [x.name for x in tmp_path.glob("gradients*")] == ["gradients-maskllm.safetensors"]


def test_another_pattern_is_refused():
    message = (
        "Expected `group_size` 4, which the metric maskllm is made for, got 8. Use 4, or another metric."
    )
    with pytest.raises(ValueError, match=message):
        Method("maskllm", group_size=8)


def test_what_it_can_not_serve_is_refused_before(monkeypatch):
    monkeypatch.setattr(maskllm, "stream_blocks", None)
    with pytest.raises(
        ValueError, match=r"groups of 4 for the metric maskllm, got 50 at model.layers.0.mlp.down_proj"
    ):
        collect_gradients(small_anatomy(intermediate_size=50), TOKENS, ["maskllm"])
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    with pytest.raises(ValueError, match="GB of memory for gradients of windows of 24 tokens"):
        collect_gradients(small_anatomy(), TOKENS, ["maskllm"])


@pytest.mark.parametrize("name", ["mixtral", "llama4_text"])
def test_experts_of_a_mixture_have_learned_masks_too(name, monkeypatch):
    monkeypatch.setattr(maskllm, "FEWEST_STEPS", 4)
    anatomy = dissect(make_mixture(name))
    weights = {x.name: x.weight.clone() for x in anatomy.linears}
    found = learned_masks(anatomy, TOKENS)
    assert any(x.expert is not None for x in anatomy.linears)
    assert set(found) == set(weights)
    for x in anatomy.linears:
        kept = (found[x.name] > 1).reshape(-1, 4).sum(1)
        assert (kept == 2).all()
        assert torch.equal(x.weight, weights[x.name])


def test_a_training_that_diverges_is_one_line(monkeypatch):
    monkeypatch.setattr(
        maskllm, "ce_loss", lambda anatomy, tokens: torch.tensor(math.nan, requires_grad=True)
    )
    with pytest.raises(
        DivergedError, match=r"finite losses of the masks of the metric maskllm, got NaN .* at step 0"
    ):
        learned_masks(small_anatomy(n_layers=1), TOKENS)


def test_half_of_a_row_without_groups_is_the_learned_mask():
    linear = next(small_anatomy().linears)
    logits = torch.randn(linear.n_weights // 4, 6, generator=torch.Generator().manual_seed(3))
    scores = chosen_scores(logits, pattern_masks(2, 4)).reshape(linear.weight.shape)
    whole = ModelStatistics(2, {"maskllm": {linear.name: scores}})
    weight = Method("maskllm").weights(linear, None, [0.5], whole)[0]
    assert torch.equal(weight != 0, (linear.weight != 0) & (scores >= 1))
