"""BESA: its formulas against slow readable forms, and its training."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.collected import CalibrationStatistics
from secateur.pruners.learned import besa
from secateur.pruners.learned.besa import BlockShares, learned_shares, relative_error
from secateur.pruners.learned.prodigy import D0, Prodigy
from secateur.pruners.learned.sorted_share import N_SHARES, SortedShare
from secateur.pruners.learned.training import DivergedError, MaskTrainer, step_generator
from secateur.pruners.models import memory
from secateur.pruners.models.discover import dissect
from secateur.pruners.recipes.context import Sample
from secateur.pruners.recipes.weights import plan_weights
from secateur.spaces.recipe.form import completed
from tests.mixtures import make_mixture
from tests.models import random_tokens, small_anatomy
from tests.recipe_contexts import CALIBRATION, small_context

SETTINGS = {"besa_beta": 5.0, "besa_d_coef": 0.5, "besa_passes": 8.0, "besa_softmax": "plain"}


def sample_of(anatomy, directory, tokens=None):
    tokens = random_tokens(4, 24) if tokens is None else tokens
    cache = StatisticsCache(directory, sys.maxsize)
    return Sample(tokens, "toy", CalibrationStatistics(anatomy, tokens, cache, "toy"))


@pytest.mark.parametrize("smooth", [False, True])
def test_shares_and_chances_are_those_of_the_slow_form(smooth):
    scores = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    one = SortedShare(scores, smooth=smooth)
    logits = torch.randn(N_SHARES, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one.logits.copy_(logits)
    values = [1 / (1 + math.exp(-x)) if smooth else x for x in logits.tolist()]
    betas = [math.exp(x) / sum(map(math.exp, values)) for x in values]
    candidates = [d / 100 for d in range(N_SHARES)]
    share = sum(b * p for b, p in zip(betas, candidates, strict=True))
    assert float(one.share.detach()) == pytest.approx(share, rel=1e-5)
    mask = one.mask()
    upper = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((mask * upper).sum(), one.logits)
    expected = torch.zeros(N_SHARES, dtype=torch.float64)
    for i in range(3):
        order = scores[i].argsort().tolist()
        for rank, j in enumerate(order):
            assert float(mask[i, j].detach()) == pytest.approx(float(rank >= int(7 * share)), abs=1e-6)
            # chance of being kept: 1 - sum of betas whose candidates prune this rank
            hit = [float(rank < int(7 * p + 1e-9)) for p in candidates]
            mean = sum(b * h for b, h in zip(betas, hit, strict=True))
            for d, (b, v) in enumerate(zip(betas, values, strict=True)):
                expected[d] -= float(upper[i, j]) * b * (hit[d] - mean) * (v * (1 - v) if smooth else 1.0)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_the_sigmoid_of_the_released_code_reaches_few_shares():
    one = SortedShare(torch.rand(2, 8), smooth=True)
    with torch.no_grad():
        one.logits.copy_(torch.where(torch.arange(N_SHARES) > 62, 50.0, -50.0))
    assert 0.61 < float(one.share.detach()) < 0.63


def test_prodigy_takes_the_steps_of_the_slow_form():
    p = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = Prodigy([p], d_coef=3.0)
    x, start = p.tolist(), p.tolist()
    mean, square, total = [0.0] * 3, [0.0] * 3, [0.0] * 3
    d, numerator, beta3 = D0, 0.0, math.sqrt(0.999)
    for _ in range(25):
        optimizer.zero_grad()
        (p.square() * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        optimizer.step()
        g = [2 * w * v for w, v in zip((1.0, 2.0, 3.0), x, strict=True)]
        numerator = beta3 * numerator + d / D0 * d * sum(g[i] * (start[i] - x[i]) for i in range(3))
        for i in range(3):
            mean[i] = 0.9 * mean[i] + 0.1 * d * g[i]
            square[i] = 0.999 * square[i] + 0.001 * d * d * g[i] ** 2
            total[i] = beta3 * total[i] + d / D0 * d * g[i]
        grown = max(d, 3.0 * numerator / sum(map(abs, total)))
        x = [x[i] - d * mean[i] / (math.sqrt(square[i]) + grown * 1e-8) for i in range(3)]
        d = grown
        assert p.tolist() == pytest.approx(x, rel=1e-9)
    assert d > 100 * D0


def test_relative_error_by_hand():
    target = torch.tensor([[[3.0, 1.0], [4.0, 0.0]]])
    output = torch.tensor([[[3.0, 0.0], [3.0, 1.0]]])
    assert float(relative_error(output, target)) == pytest.approx((1 / 25 + 2 / 1) / 2)


def test_the_shares_are_learned_and_meet_the_budget(tmp_path):
    anatomy = small_anatomy(n_layers=2)
    before = [x.weight.clone() for x in anatomy.linears]
    shares = learned_shares(anatomy, sample_of(anatomy, tmp_path), sparsity=0.6, **SETTINGS)
    assert len(shares) == len(before)
    assert len(set(shares)) == len(shares)
    for block in anatomy.blocks:
        sizes = [x.n_weights for x in block.linears]
        of = shares[block.index * len(sizes) :][: len(sizes)]
        assert sum(s * n for s, n in zip(of, sizes, strict=True)) / sum(sizes) == pytest.approx(0.6, abs=0.1)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, anatomy.linears, strict=True))
    assert all("forward" not in vars(x.module) for x in anatomy.linears)


def test_training_lowers_the_error_at_an_equal_share(tmp_path):
    """Shares of a block whose MLP alone matters: its attention loses more."""
    anatomy = small_anatomy(n_layers=1)
    for linear in anatomy.linears:
        if linear.role == "o":
            linear.weight.mul_(1e-3)
    shares = learned_shares(
        anatomy, sample_of(anatomy, tmp_path), sparsity=0.5, **SETTINGS | {"besa_passes": 60.0}
    )
    by_role = {x.role: share for x, share in zip(anatomy.linears, shares, strict=True)}
    assert min(by_role[x] for x in ("q", "k", "v", "o")) > max(by_role[x] for x in ("gate", "up", "down"))


def test_a_killed_run_goes_on_behind_the_finished_blocks(tmp_path, monkeypatch):
    anatomy = small_anatomy(n_layers=3)
    whole = learned_shares(anatomy, sample_of(anatomy, tmp_path / "a"), sparsity=0.5, **SETTINGS)
    trained, train = [], BlockShares.train

    def killed(self, *args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(self)
        return train(self, *args)

    monkeypatch.setattr(BlockShares, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        learned_shares(anatomy, sample_of(anatomy, tmp_path / "b"), sparsity=0.5, **SETTINGS)
    trained.clear()
    again = learned_shares(anatomy, sample_of(anatomy, tmp_path / "b"), sparsity=0.5, **SETTINGS)
    assert len(trained) == 1
    assert again == whole
    other = SETTINGS | {"besa_beta": 1.0}
    monkeypatch.setattr(BlockShares, "train", train)
    assert learned_shares(anatomy, sample_of(anatomy, tmp_path / "b"), sparsity=0.5, **other) != whole


def test_a_recipe_with_the_rule_meets_its_budget_to_the_weight(tmp_path):
    context = small_context(tmp_path, 2)
    form = {"unit": "weights", "sparsity": 0.55, "calibration": CALIBRATION, "metric": "wanda"}
    plan = plan_weights(context, completed(form | {"allocation": "besa"}))
    total = sum(x.n_weights for x in context.anatomy.linears)
    assert abs(sum(plan.counts.values()) - 0.55 * total) <= 1
    assert len({round(x, 3) for x in plan.sparsity.values()}) > 2


def test_a_training_that_diverges_is_one_line(tmp_path):
    anatomy = small_anatomy(n_layers=1)
    next(iter(anatomy.linears)).weight[0, 0] = torch.nan
    message = r"Expected finite losses of the shares of model\.layers\.0, got NaN or infinity at step 0 of 32"
    with pytest.raises(DivergedError, match=message):
        learned_shares(anatomy, sample_of(anatomy, tmp_path), sparsity=0.5, **SETTINGS)


def test_what_it_can_not_serve_is_refused_before(tmp_path, monkeypatch):
    anatomy = small_anatomy(n_layers=1)
    monkeypatch.setattr(besa, "BlockRunner", None)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    with pytest.raises(ValueError, match="GB of memory for the shares of a block, learned by the rule besa"):
        learned_shares(anatomy, sample_of(anatomy, tmp_path), sparsity=0.5, **SETTINGS)


def test_experts_of_a_mixture_have_shares_idle_ones_too(tmp_path):
    model = make_mixture("deepseek_v3")
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer[5] = -1e3  # the router never takes it
    mixed = dissect(model)
    shares = learned_shares(mixed, sample_of(mixed, tmp_path), sparsity=0.5, **SETTINGS)
    by_name = dict(zip((x.name for x in mixed.linears), shares, strict=True))
    of_experts = {x.name: by_name[x.name] for x in mixed.linears if x.expert is not None}
    assert len(of_experts) == 3 * 6
    assert all(0 < share < 1 for share in of_experts.values())
    sizes = [x.n_weights for x in mixed.blocks[1].linears]
    lost = sum(n * by_name[x.name] for n, x in zip(sizes, mixed.blocks[1].linears, strict=True))
    assert lost / sum(sizes) == pytest.approx(0.5, abs=0.1)


# --- the trainer ---


class Noisy:
    """Training of three numbers with noise of each step."""

    def __init__(self, state=None, fail_at=None, optimizer=torch.optim.AdamW):
        self.p = torch.tensor([3.0, -1.0, 2.0], requires_grad=True)
        self.fail_at = fail_at
        self.trainer = MaskTrainer(
            {"p": self.p},
            optimizer([self.p]),
            self.loss,
            12,
            what="numbers",
            clip=1.0,
            rate=lambda step: 1 / (step + 1),
            settle=lambda step: self.p.clamp_(max=2.5),
            state=state,
        )

    def loss(self, step):
        if step == self.fail_at:
            raise KeyboardInterrupt
        noise = torch.randn(3, generator=step_generator(7, step, torch.device("cpu")))
        return (self.p - noise).square().sum()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, Prodigy])
def test_a_killed_training_ends_as_an_unbroken_one(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(MaskTrainer, "SAVE_SECONDS", 0.0)
    anatomy = small_anatomy(n_layers=1)
    state = sample_of(anatomy, tmp_path).statistics.state("numbers")
    whole = Noisy(optimizer=optimizer)
    whole.trainer.run()
    broken = Noisy(state, fail_at=5, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        broken.trainer.run()
    again = Noisy(sample_of(anatomy, tmp_path).statistics.state("numbers"), optimizer=optimizer)
    again.trainer.load(again.trainer._state.load())
    assert again.trainer.step == 5
    again.trainer.run()
    assert torch.equal(again.p, whole.p)
    assert float(again.p.detach().max()) <= 2.5
    assert not torch.equal(broken.p, whole.p)


def test_gradients_that_are_not_finite_end_it():
    p = torch.tensor([0.0], requires_grad=True)
    trainer = MaskTrainer({"p": p}, torch.optim.SGD([p], 0.1), lambda step: p.sqrt().sum(), 3, what="roots")
    with pytest.raises(
        DivergedError, match="Expected finite gradients of roots, got NaN or infinity at step 0"
    ):
        trainer.run()
    assert float(p.detach()) == 0.0
