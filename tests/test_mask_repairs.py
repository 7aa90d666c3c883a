"""Repairs of chosen masks: exact where an optimum is known, and never worse than no repair."""

from __future__ import annotations

import pytest
import torch

from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.linalg import inverse_factor
from secateur.pruners.masks import mask
from secateur.pruners.structure.obs import obs_update
from secateur.pruners.structure.refit import RepairInputs
from secateur.pruners.weights.mask_repairs import Masked, output_errors
from secateur.pruners.weights.method import LayerProblem
from secateur.pruners.weights.sparsegpt import sparsegpt
from secateur.spaces.methods import MASK_REPAIRS

DAMP = 0.01
N_OUT, N_IN = 24, 70  # more columns than are carried over at once


def inputs_of(seed, n_tokens=300, n_in=N_IN):
    """Correlated inputs with means that are not zero, and what is known of them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in, generator=generator) / n_in**0.5 + torch.eye(n_in)
    rows = torch.randn(n_tokens, n_in, generator=generator) @ mixing
    rows = rows * torch.exp(torch.randn(n_in, generator=generator)) + torch.randn(n_in, generator=generator)
    found = InputStatistics.empty(n_in, gram=True, device=rows.device)
    found.add(rows)
    return rows, found


def masked(seed, sparsity=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N_OUT, N_IN, generator=generator).to(dtype)
    rows, inputs = inputs_of(seed)
    kept = mask(weight.float().abs() * inputs.norm, sparsity)
    return Masked(weight, kept, inputs, DAMP, "a layer"), rows


@pytest.mark.parametrize("name", MASK_REPAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_every_repair_keeps_to_the_mask(name, dtype, sparsity):
    given, _ = masked(0, sparsity, dtype)
    row = MASK_REPAIRS[name]
    assert row.summary
    found = row.function(given)
    assert found.weight.dtype == dtype
    assert not found.weight[~given.kept].any()
    changed = not torch.equal(found.weight, given.weight * given.kept)
    assert changed == (row.gives == "weight" and sparsity == 0.5)
    assert (found.added is not None) == (row.gives == "bias")
    if sparsity == 0.0 and found.added is not None:
        assert not found.added.any()


@pytest.mark.parametrize("name", ["obs", "admm"])
@pytest.mark.parametrize("seed", range(4))
def test_no_output_is_worse_than_without_and_most_are_better(name, seed):
    given, rows = masked(seed)
    plain = given.weight * given.kept
    found = MASK_REPAIRS[name].function(given).weight
    after, before = (output_errors(given.weight, x, given.inputs) for x in (found, plain))
    measured = (rows @ (found - given.weight).T).square().sum(0)
    assert torch.allclose(after, measured, rtol=1e-3)
    assert (after <= before).all()
    assert after.sum() < 0.7 * before.sum()


def test_a_row_that_the_sweep_makes_worse_is_left_alone():
    """The second of three inputs is moved to make up for the first, together with the third, which then goes."""
    generator = torch.Generator().manual_seed(0)
    one, noise = torch.randn(2, 4000, 1, generator=generator)
    rows = torch.cat([one, one + 3 * noise, 3 * noise], 1)  # the second less the third is the first
    inputs = InputStatistics.empty(3, gram=True, device=rows.device)
    inputs.add(rows)
    weight = torch.tensor([[1.0, 1.0, 0.1], [1.0, 1.0, 0.1]])
    kept = torch.tensor([[False, True, False], [False, True, True]])
    given = Masked(weight, kept, inputs, 1e-4, "a layer")
    found = MASK_REPAIRS["obs"].function(given).weight
    assert torch.equal(found[0], torch.tensor([0.0, 1.0, 0.0]))
    assert torch.allclose(found[1], torch.tensor([0.0, 2.0, -0.9]), atol=0.05)


@pytest.mark.parametrize("n_gone", [1, 20, 50])
def test_obs_of_leading_columns_is_the_structured_update(n_gone):
    given, _ = masked(1)
    kept = (torch.arange(N_IN) >= n_gone).expand(N_OUT, N_IN)
    found = MASK_REPAIRS["obs"].function(Masked(given.weight, kept, given.inputs, DAMP, "a layer")).weight
    last_first = torch.arange(N_IN - 1, -1, -1)  # the structured one keeps leading columns
    moment = (given.inputs.gram / given.inputs.n_tokens).double()
    turned = RepairInputs(
        given.weight[:, last_first],
        torch.zeros(N_IN),
        moment[last_first][:, last_first],
        DAMP,
        "a layer",
    )
    (wanted,) = obs_update(turned, [N_IN - n_gone])
    assert torch.allclose(found[:, n_gone:], wanted.flip(1).float(), atol=2e-3)


def test_obs_with_sparsegpts_mask_is_sparsegpt():
    given, _ = masked(2)
    (wanted,) = sparsegpt(LayerProblem(given.weight, given.inputs, dampening=DAMP), [0.5])
    again = Masked(given.weight, wanted != 0, given.inputs, DAMP, "a layer")
    assert torch.allclose(MASK_REPAIRS["obs"].function(again).weight, wanted, atol=1e-3)


def test_obs_equals_a_slow_readable_reference():
    given, _ = masked(3)
    upper = inverse_factor(given.inputs, DAMP, "a layer").double()
    w = given.weight.double().clone()
    for j in range(N_IN):
        error = torch.where(given.kept[:, j], 0.0, w[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    found = MASK_REPAIRS["obs"].function(given).weight
    better = (found != given.weight * given.kept).any(1)
    assert better.sum() > N_OUT / 2
    assert torch.allclose(found[better], (w * given.kept)[better].float(), atol=1e-3)


def test_admm_comes_to_the_optimum_of_each_row():
    given, _ = masked(4)
    found = MASK_REPAIRS["admm"].function(given).weight
    gram = given.inputs.gram.double()
    best = torch.zeros_like(given.weight, dtype=torch.float64)
    for i, kept in enumerate(given.kept):
        target = gram[kept] @ given.weight[i].double()
        best[i, kept] = torch.linalg.solve(gram[kept][:, kept], target)
    errors = {
        name: float(output_errors(given.weight, x.float(), given.inputs).sum())
        for name, x in {"admm": found, "best": best, "none": given.weight * given.kept}.items()
    }
    assert errors["best"] <= errors["admm"] < errors["best"] + 0.1 * (errors["none"] - errors["best"])


def test_the_bias_makes_up_for_means():
    given, rows = masked(5)
    found = MASK_REPAIRS["bias"].function(given)
    outputs = rows @ found.weight.T + found.added
    assert torch.allclose(outputs.mean(0), (rows @ given.weight.T).mean(0), atol=1e-3)
    assert not torch.allclose((rows @ found.weight.T).mean(0), outputs.mean(0), atol=0.1)
