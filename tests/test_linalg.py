"""Factors of second moments in one matrix's memory: the numbers of separate steps, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.linalg import check_finite, dampened, inverse_factor, mirror_lower
from secateur.pruners.models.memory import forget_peak, resident_bytes


def statistics(n_in: int, n_tokens: int) -> InputStatistics:
    inputs = InputStatistics.empty(n_in, gram=True, device=torch.device("cpu"))
    inputs.add(torch.randn(n_tokens, n_in, generator=torch.Generator().manual_seed(0)))
    return inputs


def in_steps(inputs: InputStatistics, dampening: float) -> Tensor:
    moment = dampened(inputs.gram / inputs.n_tokens, dampening)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)


@pytest.mark.parametrize("n_in", [1, 7, 64, 1024, 1500])
def test_the_factor_is_that_of_separate_steps(n_in):
    inputs = statistics(n_in, n_in + 20)
    before = inputs.gram.clone()
    upper = inverse_factor(inputs, 0.01, "a layer")
    assert torch.equal(upper, in_steps(inputs, 0.01))
    assert torch.equal(inputs.gram, before)
    assert torch.equal(upper, upper.triu())


def test_damping_is_raised_where_the_matrix_is_not_positive_definite():
    inputs = statistics(8, 20)
    inputs.gram -= 1.05 * torch.linalg.eigvalsh(inputs.gram)[0] * torch.eye(8)
    inputs.gram.diagonal().clamp_(min=0.5)
    moment, steps = inputs.gram.double() / 20, [1e-3 * 10**x for x in range(6)]
    [damp, *_] = [x for x in steps if torch.linalg.cholesky_ex(dampened(moment, x)).info == 0]
    assert damp > steps[0]
    assert torch.allclose(inverse_factor(inputs, steps[0], "a layer"), in_steps(inputs, damp), rtol=1e-3)


@pytest.mark.parametrize("size", [3, 1024, 1100])
def test_the_lower_triangle_is_mirrored(size):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    wanted = matrix.tril() + matrix.tril(-1).T
    mirror_lower(matrix)
    assert torch.equal(matrix, wanted)


def test_what_is_not_finite_is_found_in_every_part():
    for place in (0, 1677, 2499):
        moment = torch.zeros(2500, 2500)
        moment[place, 1] = float("nan")
        with pytest.raises(ValueError, match="Expected finite inputs, got NaN or infinity at a layer"):
            check_finite(moment, "a layer")


def test_one_matrix_is_held_beside_the_moments():
    inputs = statistics(3000, 100)
    inverse_factor(inputs, 0.01, "a layer")  # buffers that the threads of LAPACK keep are not counted
    forget_peak()
    before = resident_bytes()
    upper = inverse_factor(inputs, 0.01, "a layer")
    most = resident_bytes("VmHWM") - before
    assert most < 1.7 * upper.nbytes
