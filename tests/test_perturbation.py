"""Bonsai: the regression finds effects, the masks are what they should be, and models are cut by it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from secateur.pruners.calibration.stream import mean_loss
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.structure import bonsai as perturbation
from secateur.pruners.structure.bonsai import perturbation_scores, ridge
from tests.models import random_tokens, small_anatomy
from tests.structures import CONFIGS, TOKENS, build, logits


def loss(anatomy, tokens):
    runner = BlockRunner(anatomy)
    with torch.no_grad():
        return mean_loss(anatomy, runner.run(runner.start(tokens)), tokens)


def signs(n_pairs, n_units, seed=0):
    drawn = torch.rand(n_pairs, n_units, generator=torch.Generator().manual_seed(seed)) < 0.5
    return drawn.double() * 2 - 1


# --- the regression ---


def test_exact_effects_are_found_where_there_are_masks_enough():
    effects = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = signs(60, 10)
    for prior in (torch.ones(10).double(), torch.zeros(10).double()):
        assert torch.allclose(ridge(s, s @ effects, prior), effects, atol=1e-2)


def test_large_effects_stand_out_with_fewer_masks_than_units():
    generator = torch.Generator().manual_seed(2)
    effects = torch.zeros(100, dtype=torch.float64)
    effects[[3, 50, 97]] = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)
    s = signs(40, 100)
    noise = torch.randn(40, dtype=torch.float64, generator=generator)
    found = ridge(s, s @ effects + noise, torch.ones(100).double())
    assert set(found.topk(3).indices.tolist()) == {3, 50, 97}


def test_where_masks_say_little_the_prior_decides():
    """But never upside down: one that masks speak against counts as none."""
    prior = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    s = signs(30, 300)
    found = ridge(s, s @ (2 * prior), prior)
    assert torch.allclose(found, 2 * prior, rtol=1e-6)
    against = ridge(s, s @ (-2 * prior), prior)
    assert torch.corrcoef(torch.stack([against, -prior]))[0, 1] > 0.1
    assert torch.equal(against, ridge(s, s @ (-2 * prior), torch.zeros_like(prior)))


# --- scores ---


def test_a_unit_alone_is_scored_by_two_losses():
    """Of two groups and two channels one each is loose: a pair is the model without it, and the model."""
    anatomy = small_anatomy(
        n_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=2, head_dim=16
    )
    tokens = random_tokens(3, 10)
    found = perturbation_scores(anatomy, tokens, n_pairs=4)
    effects = []
    for part in find_layouts(anatomy)[0].sublayers:
        score, weight = found[part.output.name], part.output.weight
        loose = int(score.argmin())
        columns = slice(loose * part.unit_width, (loose + 1) * part.unit_width)
        dense, before = weight.clone(), loss(anatomy, tokens)
        weight[:, columns] = 0.0
        effects.append(loss(anatomy, tokens) - before)
        weight.copy_(dense)
        assert float(score[loose]) == pytest.approx(effects[-1], rel=1e-3)
    for score in found.values():
        assert float(score.max()) > max(effects)  # never left out


def test_scores_go_with_the_loss_of_single_units():
    anatomy = small_anatomy(n_layers=2)
    tokens = random_tokens(4, 16)
    found = perturbation_scores(anatomy, tokens, n_pairs=24)
    layouts = find_layouts(anatomy)
    measured, predicted = [], []
    dense = loss(anatomy, tokens)
    for layout in layouts:
        part = layout.mlp
        score, weight = found[part.output.name], part.output.weight
        for unit in score.topk(24, largest=False).indices.tolist():
            column = weight[:, unit].clone()
            weight[:, unit] = 0.0
            measured.append(loss(anatomy, tokens) - dense)
            weight[:, unit] = column
            predicted.append(float(score[unit]))
    alike = torch.corrcoef(torch.tensor([measured, predicted]))[0, 1]
    assert float(alike) > 0.4


def test_each_pair_leaves_out_each_loose_unit_once(monkeypatch):
    anatomy = small_anatomy()
    left_out, real = [], perturbation._leave_out

    def record(sublayer, gone):
        left_out.append((sublayer.layout.output.name, set(sublayer.loose[gone].tolist())))
        return real(sublayer, gone)

    monkeypatch.setattr(perturbation, "_leave_out", record)
    found = perturbation_scores(anatomy, TOKENS, n_pairs=3)
    assert len(left_out) == 3 * 2 * len(found)
    n_alike = len(found) // 2  # attentions first, then MLPs
    for pair in range(6):
        first, second = (left_out[(2 * pair + side) * n_alike :][:n_alike] for side in (0, 1))
        for (name, one), (_, other) in zip(first, second, strict=True):
            n_units = len(found[name])
            assert not one & other
            assert len(one | other) == (n_units + 1) // 2
            assert abs(len(one) - len(other)) <= 1


def test_the_model_is_as_it_was_and_forgets_the_masks():
    anatomy = small_anatomy()
    before = logits(anatomy.model)
    weights = {name: x.clone() for name, x in anatomy.model.named_parameters()}
    first, again, other = (perturbation_scores(anatomy, TOKENS, n_pairs=2, seed=x) for x in (0, 0, 1))
    assert all(torch.equal(score, again[name]) for name, score in first.items())
    assert not all(torch.equal(score, other[name]) for name, score in first.items())
    assert torch.equal(logits(anatomy.model), before)
    assert all(torch.equal(x, weights[name]) for name, x in anatomy.model.named_parameters())
    broken = deepcopy(anatomy)
    # of the last block, as the first is probed; of values, as some kernels lose NaN in a softmax
    values = next(linear for linear in broken.blocks[-1].linears if linear.role == "v")
    values.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="Expected finite inputs, got NaN or infinity at the attention"):
        perturbation_scores(broken, TOKENS, n_pairs=2)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_scored(family):
    anatomy = dissect(build(CONFIGS[family]))
    before = logits(anatomy.model)
    scores = perturbation_scores(anatomy, TOKENS, n_pairs=1)
    outputs = [linear for linear in anatomy.linears if linear.role in ("o", "down")]
    assert scores.keys() == {linear.name for linear in outputs}
    assert all(torch.isfinite(score).all() and score.unique().numel() > 1 for score in scores.values())
    assert torch.equal(logits(anatomy.model), before)
