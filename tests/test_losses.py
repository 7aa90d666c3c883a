"""Losses of a pruned model against plain code: KL, cross-entropy, acceptance and weighted KL."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secateur.evaluators.data.windows import EvaluationData, losses_on, teacher_batches
from secateur.evaluators.losses import LossSums, Teacher, loss_sums
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.spaces.measurement import Fidelity
from tests.blockwise import SMALL
from tests.models import random_tokens, small_anatomy


def dense_side(anatomy: Anatomy, tokens: Tensor) -> tuple[Tensor, Tensor]:
    runner = BlockRunner(anatomy)
    return runner.run(runner.start(tokens)), anatomy.model(input_ids=tokens).logits


def halve(anatomy: Anatomy, tokens: Tensor) -> None:
    sparsity = dict.fromkeys((x.name for x in anatomy.linears), 0.5)
    prune(anatomy, sparsity, Method("magnitude"), tokens, sequential=False)


# --- KL and cross-entropy ---


@pytest.mark.parametrize("keep", [True, False])
def test_losses_equal_the_plain_ones(keep, monkeypatch):
    monkeypatch.setattr("secateur.evaluators.losses.CHUNK_TOKENS", 7)
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    dense_hidden, dense = dense_side(anatomy, tokens)
    teacher = Teacher(anatomy, lambda: dense_hidden, keep=keep)
    halve(anatomy, tokens)
    hidden, pruned = dense_side(anatomy, tokens)
    found = loss_sums(anatomy, hidden, tokens, teacher).means()
    p, q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    ce = torch.nn.functional.nll_loss(q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert kl > 0.1, "pruning shows"
    assert found["kl"] == pytest.approx(float(kl), rel=2e-3 if keep else 1e-4)
    assert found["ce"] == pytest.approx(float(ce), rel=1e-5)


def test_the_dense_model_has_no_kl():
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    hidden, _ = dense_side(anatomy, tokens)
    assert (
        loss_sums(anatomy, hidden, tokens, Teacher(anatomy, lambda: hidden, keep=True)).means()["kl"] < 1e-5
    )


def test_losses_of_a_bfloat16_model_are_accumulated_finely():
    """In bfloat16 a mean near 4 has steps of 1/32; the sums here must resolve far less."""
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    anatomy.model.to(torch.bfloat16)
    hidden, logits = dense_side(anatomy, tokens)
    ce = loss_sums(anatomy, hidden, tokens, Teacher(anatomy, lambda: hidden, keep=True)).means()["ce"]
    exact = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())
    assert ce == pytest.approx(float(exact), abs=1e-4)


# --- acceptance and weighted KL ---


def slow_values(dense: torch.Tensor, pruned: torch.Tensor, damaged: torch.Tensor) -> dict[str, float]:
    """Position by position and token by token, in float64."""
    kls, overlaps = [], []
    for p_row, q_row in zip(
        dense.double().softmax(-1).tolist(), pruned.double().softmax(-1).tolist(), strict=True
    ):
        kls.append(sum(p * math.log(p / q) for p, q in zip(p_row, q_row, strict=True)))
        overlaps.append(sum(min(p, q) for p, q in zip(p_row, q_row, strict=True)))
    chosen = [kl for kl, is_damaged in zip(kls, damaged.tolist(), strict=True) if is_damaged]
    return {"acceptance": sum(overlaps) / len(overlaps), "weighted_kl": sum(chosen) / len(chosen)}


@pytest.mark.parametrize("keep", [True, False])
def test_values_are_those_of_plain_code(keep, monkeypatch):
    monkeypatch.setattr("secateur.evaluators.losses.CHUNK_TOKENS", 7)
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    dense_hidden, dense = dense_side(anatomy, tokens)
    damaged = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    teacher = Teacher(anatomy, lambda: dense_hidden, keep=keep, acceptance=True, damaged=damaged)
    halve(anatomy, tokens)
    hidden, pruned = dense_side(anatomy, tokens)
    found = loss_sums(anatomy, hidden, tokens, teacher).means()
    expected = slow_values(dense.flatten(0, 1), pruned.flatten(0, 1), damaged.flatten())
    assert list(found) == ["kl", "ce", "acceptance", "weighted_kl"]
    assert 0.1 < expected["acceptance"] < 0.99, "pruning shows"
    assert found["acceptance"] == pytest.approx(expected["acceptance"], rel=1e-3 if keep else 1e-5)
    assert found["weighted_kl"] == pytest.approx(expected["weighted_kl"], rel=2e-3 if keep else 1e-4)
    plain = loss_sums(anatomy, hidden, tokens, Teacher(anatomy, lambda: dense_hidden, keep=False)).means()
    if not keep:
        assert {name: found[name] for name in ("kl", "ce")} == plain, "the others change nothing"


def test_all_positions_are_the_usual_kl_and_the_dense_model_is_always_accepted():
    anatomy, tokens = small_anatomy(), random_tokens(2, 16, 5)
    hidden, _ = dense_side(anatomy, tokens)
    everywhere = torch.ones(2, 16, dtype=torch.bool)
    teacher = Teacher(anatomy, lambda: hidden, keep=True, acceptance=True, damaged=everywhere)
    other = loss_sums(anatomy, hidden + torch.roll(hidden, 1, -1), tokens, teacher).means()
    assert other["weighted_kl"] == pytest.approx(other["kl"], rel=1e-12)
    assert other["kl"] > 0.001
    assert loss_sums(anatomy, hidden, tokens, teacher).means()["acceptance"] == pytest.approx(1, abs=2e-4)


# --- sums, windows and live models ---


def test_sums_add_by_name():
    a, b = LossSums({"kl": (1.0, 2), "ce": (4.0, 1)}), LossSums({"kl": (3.0, 2), "ce": (2.0, 1)})
    assert (a + b).means() == {"kl": 1.0, "ce": 3.0}
    assert sum([a, b], LossSums()) == a + b


@pytest.mark.parametrize("loss", ["kl", "ce", "acceptance", "weighted_kl"])
def test_losses_of_windows_are_those_of_each_alone_and_mean_to_the_whole(loss, monkeypatch):
    monkeypatch.setattr("secateur.evaluators.losses.CHUNK_TOKENS", 7)  # no whole number of windows
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    dense_hidden, _ = dense_side(anatomy, tokens)
    damaged = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    hidden = dense_hidden + torch.roll(dense_hidden, 1, -1)

    def sums(rows):
        teacher = Teacher(
            anatomy, lambda: dense_hidden[rows], keep=False, acceptance=True, damaged=damaged[rows]
        )
        return loss_sums(anatomy, hidden[rows], tokens[rows], teacher)

    whole = sums(slice(0, 2)) + sums(slice(2, 3))
    windows = whole.window_losses(loss)
    mean = whole.means()[loss]
    assert sum(windows) / 3 == pytest.approx(1 - mean if loss == "acceptance" else mean, rel=1e-5)
    alone = [sums(slice(i, i + 1)) for i in range(3)]
    if loss == "weighted_kl":  # a window of many such positions counts as much more
        expected = [x.sums[loss][0] * 3 / whole.sums[loss][1] for x in alone]
    else:
        expected = [x.window_losses(loss)[0] for x in alone]
    assert windows == pytest.approx(expected, rel=1e-5)
    assert len({round(x, 4) for x in windows}) == 3


def test_live_models_and_recovery_measure_the_same():
    anatomy, tokens = small_anatomy(), random_tokens(6, 16, 1)
    damaged = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) < 0.2
    fidelity = Fidelity("search", 96)
    data = EvaluationData(anatomy, {"search": tokens}, [Fidelity("search", 32), fidelity], acceptance=True,
                          damaged={"search": damaged})  # fmt: skip
    data.of(fidelity)
    dense = small_anatomy()
    batches = teacher_batches(dense, tokens, acceptance=True, damaged=damaged)
    halve(anatomy, tokens)
    assert losses_on(anatomy, batches) == pytest.approx(data.live_losses(fidelity), rel=2e-3)


# --- the dense side ---


def test_processes_share_one_dense_side(tmp_path):
    anatomy, tokens = small_anatomy(), random_tokens(3, 16, 5)
    hidden, _ = dense_side(anatomy, tokens)
    file = tmp_path / "dense.safetensors"
    first = Teacher(anatomy, lambda: hidden, keep=True, file=file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    def never() -> Tensor:
        raise AssertionError("it is there already")

    second = Teacher(anatomy, never, keep=True, file=file)
    alone = Teacher(anatomy, lambda: hidden, keep=True)
    losses = [loss_sums(anatomy, hidden * 1.1, tokens, teacher) for teacher in (first, second, alone)]
    assert losses[0] == losses[1] == losses[2]
    elsewhere = tmp_path / "missing" / "dense.safetensors"  # as on a full disk
    assert (
        loss_sums(anatomy, hidden * 1.1, tokens, Teacher(anatomy, lambda: hidden, keep=True, file=elsewhere))
        == losses[2]
    )


def test_the_dense_side_is_shared_by_those_who_name_it_alike(tmp_path):
    """Two models may have the same windows, and even the same staged directory."""
    windows = {"search": random_tokens(6, 16, 1), "test": random_tokens(2, 16, 2)}
    models = {"one": small_anatomy(), "two": small_anatomy()}
    with torch.no_grad():
        models["two"].head.weight.mul_(3)
    losses = {}
    for name in ("one", "two", "one"):
        data = EvaluationData(models[name], windows, [SMALL], shared=tmp_path / f".dense-{name}")
        data.of(SMALL)
        assert data.live_losses(SMALL)["kl"] < 1e-5
        losses.setdefault(name, []).append(data.live_losses(SMALL)["ce"])
    assert losses["one"][0] == losses["one"][1] != losses["two"][0]
    assert len(list(tmp_path.iterdir())) == 2
