"""Precision: sums of bfloat16 models in fp32 and up, Cholesky factors in fp32 with fp64 where it finds none."""

from __future__ import annotations

import logging

import pytest
import torch

from secateur.evaluators.losses import Teacher, loss_sums
from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.linalg import NoFactorError, in_precision, inverse_factor, leading_solve
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.structure.obs import obs_order
from secateur.pruners.weights.method import LayerProblem, Method
from secateur.pruners.weights.pruner import prune
from secateur.pruners.weights.sparsegpt import sparsegpt
from tests.models import random_tokens, small_llama
from tests.stand_in.devices import stand_in

N = 48


def ill_conditioned(power: float = 9.0) -> torch.Tensor:
    """A second moment in fp64 whose eigenvalues span so many powers of ten: fp32 can't tell it from a singular one."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))
    return basis * torch.logspace(0, -power, N, dtype=torch.float64) @ basis.T


def seen(moment: torch.Tensor) -> InputStatistics:
    return InputStatistics(1, moment.diagonal().float(), moment)


def test_a_factor_that_fp32_does_not_find_is_computed_in_fp64_and_said_so(caplog):
    moment = ill_conditioned()
    assert torch.linalg.cholesky_ex(moment.float()).info > 0
    with caplog.at_level(logging.WARNING):
        upper = inverse_factor(seen(moment), 1e-12, "layers.3.down").double()
    assert [x.getMessage() for x in caplog.records] == [
        "fp32 finds no Cholesky factor of the inputs at layers.3.down: computed in fp64"
    ]
    wanted = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    torch.testing.assert_close(upper, wanted, rtol=0.01, atol=1e-3 * float(wanted.abs().max()))


def test_a_well_conditioned_factor_is_in_fp32_alone(caplog):
    with caplog.at_level(logging.WARNING):
        upper = inverse_factor(seen(ill_conditioned(2.0).float()), 0.01, "x")
    assert upper.dtype == torch.float32
    assert not caplog.records


def test_damping_is_raised_where_fp64_fails_too(caplog):
    singular = torch.ones(N, N, dtype=torch.float64)
    upper = inverse_factor(seen(-1e-3 * torch.eye(N, dtype=torch.float64) + singular), 1e-3, "x")
    assert torch.isfinite(upper).all()
    assert len(caplog.records) == 1
    with pytest.raises(NoFactorError, match=r"got none at x\. Raise `dampening`"):
        inverse_factor(seen(-torch.eye(N, dtype=torch.float64)), 1e-9, "x")


def test_sparsegpt_of_an_ill_conditioned_layer_updates_by_fp64s_factor():
    generator = torch.Generator().manual_seed(1)
    weight, moment = torch.randn(8, N, generator=generator), ill_conditioned()
    found = sparsegpt(LayerProblem(weight, seen(moment), dampening=1e-12), [0.5])[0].double()

    def error(w: torch.Tensor) -> float:
        change = w - weight.double()
        return float((change @ moment * change).sum())

    damped = sparsegpt(LayerProblem(weight, seen(moment), dampening=0.1), [0.5])[0].double()
    assert error(found) < 0.2 * error(damped)


def test_obs_is_in_fp32_on_a_gpu_and_in_fp64_where_that_fails(caplog):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(12, N, generator=generator)
    for power, dampening, n_lines in ((2.0, 0.01, 0), (9.0, 1e-12, 1)):
        moment = ill_conditioned(power)
        wanted = obs_order(weight, moment, 2, dampening=dampening).tolist()
        with stand_in():
            caplog.clear()
            on_gpu = moment.to("cuda")
            found = obs_order(weight.to("cuda"), on_gpu, 2, dampening=dampening, name="o_proj")
            assert found.tolist() == wanted
            assert len(caplog.records) == n_lines
            target = weight.double().to("cuda") @ on_gpu
            [solved] = leading_solve(on_gpu, target, [N], "o_proj")
            torch.testing.assert_close(solved.cpu().float(), weight, rtol=1e-2, atol=1e-2)
            assert len(caplog.records) == 2 * n_lines


def test_a_gpu_tries_fp32_first_and_a_cpu_takes_fp64():
    tried = []

    def solve(precision: torch.dtype) -> str:
        tried.append(precision)
        if precision == torch.float32:
            raise NoFactorError("none")
        return "found"

    assert in_precision(solve, torch.device("cpu"), "x") == "found"
    assert in_precision(solve, torch.device("cuda"), "x") == "found"
    assert tried == [torch.float64, torch.float32, torch.float64]


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_a_bfloat16_model_is_pruned_and_measured_with_sums_in_fp32(name):
    with stand_in():
        anatomy = dissect(small_llama().to(torch.bfloat16).to("cuda"))
        tokens = random_tokens(4, 16)
        runner = BlockRunner(anatomy)
        hidden = runner.run(runner.start(tokens))
        teacher = Teacher(anatomy, lambda: hidden, keep=True)
        assert loss_sums(anatomy, hidden, tokens, teacher).means()["kl"] < 1e-5
        prune(anatomy, {x.name: 0.5 for x in anatomy.linears}, Method(name), tokens, sequential=True)
        assert {x.weight.dtype for x in anatomy.linears} == {torch.bfloat16}
        pruned = runner.run(runner.start(tokens))
        assert pruned.dtype == torch.bfloat16
        lost = loss_sums(anatomy, pruned, tokens, teacher).means()["kl"]
    exact = dissect(small_llama())
    prune(exact, {x.name: 0.5 for x in exact.linears}, Method(name), tokens, sequential=True)
    runner = BlockRunner(exact)
    dense = dissect(small_llama())
    other = BlockRunner(dense)
    teacher = Teacher(dense, lambda: other.run(other.start(tokens)), keep=True)
    wanted = loss_sums(exact, runner.run(runner.start(tokens)), tokens, teacher).means()["kl"]
    assert lost == pytest.approx(wanted, rel=0.15)


def test_gram_matrices_of_bfloat16_inputs_do_not_round_away_small_terms():
    inputs = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    found = InputStatistics.empty(2, gram=True, device=inputs.device)
    for part in inputs.split(64):
        found.add(part)
    assert float(found.gram[0, 1]) == pytest.approx(4096 * float(inputs[0, 0]) ** 2, rel=1e-4)
