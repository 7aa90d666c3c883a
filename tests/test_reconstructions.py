"""Methods for single weights beyond metrics and SparseGPT: ADMM with given and gradual masks, DSnoT, GBLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from secateur.pruners.calibration.gradients import model_statistics
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.masks import mask
from secateur.pruners.weights.admm import Fit, admm
from secateur.pruners.weights.admm_gradual import admm_gradual, shares
from secateur.pruners.weights.dsnot import dsnot
from secateur.pruners.weights.method import LayerProblem, Method
from secateur.spaces.formulas.known import known_tree
from secateur.spaces.levels import n_zeros
from secateur.spaces.methods import METRICS, RECONSTRUCTIONS
from tests.models import random_tokens, small_anatomy

SPARSITIES = [0.0, 0.3, 0.5, 0.9, 1.0]


def problem(n_out: int = 12, n_in: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, InputStatistics]:
    """Weight, inputs that are correlated and not centred, their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in, generator=generator) / n_in**0.5 + torch.eye(n_in)
    scale = torch.exp(torch.randn(n_in, generator=generator))
    rows = (
        torch.randn(300, n_in, generator=generator) @ mixing + torch.randn(n_in, generator=generator)
    ) * scale
    inputs = InputStatistics.empty(n_in, gram=True, device=rows.device)
    inputs.add(rows)
    return torch.randn(n_out, n_in, generator=generator), rows, inputs


def wanda_mask(weight: Tensor, inputs: InputStatistics, sparsity: float) -> Tensor:
    return mask(weight.abs() * inputs.norm, sparsity)


def error(rows: Tensor, pruned: Tensor, weight: Tensor) -> float:
    return float((rows @ (pruned - weight).T).square().mean())


# --- ADMM ---


@pytest.mark.parametrize("seed", range(4))
def test_admm_fits_the_weights_of_wandas_mask(seed):
    """The mask says what stays: a released method on top of it has it the other way round."""
    weight, rows, inputs = problem(seed=seed)
    for sparsity, found in zip(SPARSITIES, admm(LayerProblem(weight, inputs), SPARSITIES), strict=True):
        kept = wanda_mask(weight, inputs, sparsity)
        assert torch.equal(found != 0, kept)
        if 0 < sparsity < 1:
            share = 0.7 if sparsity < 0.9 else 0.9
            assert error(rows, found, weight) < share * error(rows, weight * kept, weight)
    assert torch.allclose(admm(LayerProblem(weight, inputs, dampening=0.1), [0.0])[0], weight, atol=1e-4)


def test_admm_goes_to_the_optimum_of_every_row():
    weight, rows, inputs = problem()
    moment = (rows.T @ rows / len(rows)).double()
    own = moment + 0.1 * torch.diag(moment.diagonal())
    kept = wanda_mask(weight, inputs, 0.6)
    found = Fit(weight, moment, dampening=0.1).masked(kept, n_steps=5_000)
    for row in range(len(weight)):
        k = kept[row]
        wanted = torch.linalg.solve(own[k][:, k], own[k] @ weight[row].double())
        assert torch.allclose(found[row, k], wanted, atol=1e-6)


def test_admm_with_uncorrelated_inputs_leaves_the_weights_as_they_are():
    weight = problem()[0]
    identity = InputStatistics(24, torch.ones(24), torch.eye(24) * 24)
    (found,) = admm(LayerProblem(weight, identity, dampening=0.1), [0.5])
    assert torch.allclose(found, weight * mask(weight.abs(), 0.5), atol=1e-5)


def test_admm_keeps_patterns_and_bears_inputs_that_are_always_zero():
    weight, rows, _ = problem()
    rows[:, 5] = 0.0
    inputs = InputStatistics.empty(24, gram=True, device=rows.device)
    inputs.add(rows)
    (found,) = admm(LayerProblem(weight, inputs, group_size=4, dampening=0.1), [0.5])
    assert ((found == 0).reshape(-1, 4).sum(1) == 2).all()
    assert torch.isfinite(found).all()


# --- ADMM with a gradual mask ---


def slow_gradual(
    weight: Tensor, rows: Tensor, sparsity: float, *, by_output: bool = False, group_size: int | None = None
) -> Tensor:
    """Weight by weight, as the paper has it, in fp64."""
    x, w0 = rows.double(), weight.double()
    norm = (x * x).mean(0).sqrt()
    h = (x / norm).T @ (x / norm) / len(x) + 0.1 * torch.eye(len(norm), dtype=torch.float64)
    w0 = w0 * norm
    w, u = w0, torch.zeros_like(w0)
    n_out, n_in = w.shape
    for step in range(1, 21):
        if step <= 15:
            share = sparsity * (1 - (1 - step / 15) ** 3)
            order = sorted((float((w + u)[i, j].abs()), i, j) for i in range(n_out) for j in range(n_in))
            kept = torch.ones(n_out, n_in, dtype=torch.bool)
            if group_size:
                of_group: dict[tuple[int, int], int] = {}
                free = []
                for score, i, j in order:
                    group = (i, j // group_size)
                    of_group[group] = of_group.get(group, 0) + 1
                    if of_group[group] <= n_zeros(sparsity, group_size):
                        free.append((score, i, j))
                order = free
            if by_output:
                total = n_zeros(share, n_out * n_in)
                for i in range(n_out):
                    count = total // n_out + (i < total % n_out)
                    for _, _, j in [x for x in order if x[1] == i][:count]:
                        kept[i, j] = False
            else:
                for _, i, j in order[: n_zeros(share, n_out * n_in)]:
                    kept[i, j] = False
        z = (w + u) * kept
        u = u + w - z
        w = (w0 @ h + z - u) @ torch.linalg.inv(h + torch.eye(n_in, dtype=torch.float64))
    return (w + u) * kept / norm


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("further", [{}, {"by_output": True}, {"group_size": 4}])
def test_gradual_admm_is_its_slow_form(seed, further):
    weight, rows, inputs = problem(n_out=6, n_in=12, seed=seed)
    layer = LayerProblem(
        weight,
        inputs,
        comparison="output" if further.get("by_output") else "layer",
        group_size=further.get("group_size"),
        dampening=0.1,
    )
    for sparsity, found in zip((0.25, 0.5, 0.75), admm_gradual(layer, (0.25, 0.5, 0.75)), strict=True):
        wanted = slow_gradual(weight, rows, sparsity, **further).float()
        assert torch.equal(found != 0, wanted != 0)
        assert torch.allclose(found, wanted, atol=1e-4)


def test_shares_of_the_gradual_mask_rise_as_a_cubic():
    found = shares(0.9)
    assert len(found) == 15
    assert found[4] == pytest.approx(0.9 * 19 / 27)
    assert found[9] == pytest.approx(0.9 * 26 / 27)
    assert found[14] == 0.9
    assert shares(1.0)[14] == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_a_gradual_mask_fits_better_than_wandas(seed):
    weight, rows, inputs = problem(n_out=32, n_in=64, seed=seed)
    layer = LayerProblem(weight, inputs, comparison="layer", dampening=0.1)
    for sparsity in (0.5, 0.7):
        (gradual,), (fixed,) = admm_gradual(layer, [sparsity]), admm(layer, [sparsity])
        assert error(rows, gradual, weight) < 0.9 * error(rows, fixed, weight)


def test_gradual_admm_prunes_inputs_that_are_always_zero_first_and_keeps_patterns():
    weight, rows, _ = problem()
    rows[:, 5] = 0.0
    weight[:, 5] = 100.0
    inputs = InputStatistics.empty(24, gram=True, device=rows.device)
    inputs.add(rows)
    layer = LayerProblem(weight, inputs, comparison="layer")
    (found,) = admm_gradual(layer, [1 / 24])
    assert (found[:, 5] == 0).all()
    assert (found[:, :5] != 0).all()
    (found,) = admm_gradual(LayerProblem(weight, inputs, group_size=4), [0.5])
    assert ((found == 0).reshape(-1, 4).sum(1) == 2).all()
    assert torch.isfinite(found).all()


# --- DSnoT ---


def slow_dsnot(weight: Tensor, rows: Tensor, sparsity: float) -> Tensor:
    """Row by row, swap by swap."""
    mean, variance, norm = rows.mean(0), rows.var(0, correction=0), rows.square().mean(0).sqrt()
    kept = mask(weight.abs() * norm, sparsity)
    for row, w in enumerate(weight):
        for _ in range(50):
            k = kept[row]
            e = float((w * mean)[~k].sum())
            sign = 1.0 if e > 0 else -1.0
            revived = [j for j in range(len(w)) if not k[j]]
            candidates = [j for j in range(len(w)) if k[j] and sign * w[j] * mean[j] < 0]
            if not revived or not candidates:
                break
            grow = max(revived, key=lambda j: float(sign * w[j] * mean[j] / variance[j]))
            prune = min(candidates, key=lambda j: float(w[j].abs() * norm[j]))
            after = e - float(w[grow] * mean[grow]) + float(w[prune] * mean[prune])
            if abs(after) >= abs(e):
                break
            kept[row, grow], kept[row, prune] = True, False
    return kept


@pytest.mark.parametrize("seed", range(3))
def test_dsnot_swaps_until_mean_outputs_agree(seed):
    weight, rows, inputs = problem(seed=seed)
    for sparsity, found in zip(SPARSITIES, dsnot(LayerProblem(weight, inputs), SPARSITIES), strict=True):
        kept = found != 0
        assert torch.equal(found, weight * kept)  # no weight is changed
        before = wanda_mask(weight, inputs, sparsity)
        assert torch.equal(kept.sum(1), before.sum(1))
        shift, old = ((rows @ (weight * x - weight).T).mean(0).abs() for x in (kept, before))
        assert (shift <= old + 1e-4).all()
        assert torch.equal(kept, slow_dsnot(weight, rows, sparsity))
        if sparsity == 0.5:
            assert float(shift.sum()) < 0.6 * float(old.sum())


def test_dsnot_of_centred_inputs_is_wanda():
    weight, rows, _ = problem()
    inputs = InputStatistics.empty(24, gram=False, device=rows.device)
    inputs.add(torch.cat([rows, -rows]))
    inputs.total.zero_()  # but for rounding
    assert torch.equal(dsnot(LayerProblem(weight, inputs), [0.5])[0] != 0, wanda_mask(weight, inputs, 0.5))


# --- GBLM, and the registries ---


def test_gblm_by_hand():
    anatomy = small_anatomy()
    tokens = random_tokens(3, 12)
    whole = model_statistics(anatomy, tokens, gradients=Method("gblm").gradients)
    linear = next(anatomy.linears)
    inputs = InputStatistics.empty(linear.in_features, gram=False, device=linear.weight.device)
    inputs.add(torch.randn(30, linear.in_features, generator=torch.Generator().manual_seed(0)) * 1e-2)
    # the released script's units: gradients times 100, summed squares over windows; inputs meant over windows
    gradient = (3 * (100 * whole.gradients["rms"][linear.name]) ** 2).sqrt()
    score = linear.weight.abs() * ((12 * inputs.norm**2).sqrt() + gradient)
    (found,) = Method("gblm").weights(linear, inputs, [0.5], whole)
    assert torch.equal(found != 0, mask(score, 0.5))
    assert not torch.equal(found != 0, mask(linear.weight.abs() * inputs.norm, 0.5))


def test_gblm_at_the_published_sizes_is_its_formula():
    linear = next(small_anatomy().linears)
    inputs = InputStatistics.empty(linear.in_features, gram=False, device=linear.weight.device)
    inputs.add(torch.randn(30, linear.in_features, generator=torch.Generator().manual_seed(0)) * 1e-2)
    whole = ModelStatistics(
        2, {"rms": {linear.name: linear.weight.abs().flip(0) * 1e-3}}, windows=(128, 2048)
    )
    formula = Method("gblm", formula=known_tree("gblm"))
    found, expected = (x.scores(linear, inputs, whole) for x in (Method("gblm"), formula))
    assert torch.allclose(found, expected, rtol=1e-5)
    fewer = replace(whole, windows=(32, 2048))
    assert not torch.allclose(Method("gblm").scores(linear, inputs, fewer), expected, rtol=1e-2)


def test_patterns_are_refused_where_a_method_has_none():
    with pytest.raises(
        ValueError, match=r"no `group_size` with the metric dsnot, got 4. .* admm, admm_gradual\."
    ):
        Method("dsnot", group_size=4)
    assert Method("admm", group_size=4).updates_weights


def reconstructed(name: str, dtype: torch.dtype) -> Tensor:
    """Levels of a small model's first projection."""
    anatomy, tokens = small_anatomy(), random_tokens(3, 12)
    linear = next(anatomy.linears)
    _, _, inputs = problem(n_in=linear.in_features)
    method = Method(name)
    contrast = random_tokens(3, 12, seed=1)
    whole = model_statistics(anatomy, tokens, gradients=method.gradients, contrast=contrast)
    linear.point_to(linear.weight.to(dtype))
    return method.weights(linear, inputs, SPARSITIES, whole)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_every_reconstruction_zeroes_exactly_so_many(name):
    levels = reconstructed(name, torch.float32)
    assert [int((x == 0).sum()) for x in levels] == [n_zeros(s, levels[0].numel()) for s in SPARSITIES]


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_rows_of_weights_in_half_precision_are_in_one_run(name):
    """On a CPU products with others take many times as long."""
    levels = reconstructed(name, torch.bfloat16)
    assert levels.dtype == torch.bfloat16
    assert levels.is_contiguous()


def test_every_row_says_what_it_is_and_where_from():
    assert not METRICS.keys() & RECONSTRUCTIONS.keys()
    for name, row in [*METRICS.items(), *RECONSTRUCTIONS.items()]:
        assert row.summary
        assert row.paper.startswith("https://") or name == "random"
