from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.masks import lowest, mask
from secateur.pruners.weights.magnitude import magnitude
from secateur.pruners.weights.method import LayerProblem, Method
from secateur.pruners.weights.pruner import prune
from secateur.pruners.weights.ria import ria
from secateur.pruners.weights.sparsegpt import sparsegpt
from secateur.pruners.weights.wanda import wanda
from secateur.spaces.levels import n_zeros
from secateur.spaces.methods import METRICS, RECONSTRUCTIONS
from tests.models import count_zeros, random_tokens, small_anatomy

NAMES = [*METRICS, *RECONSTRUCTIONS]
GENERATOR = torch.Generator()


def statistics(inputs: Tensor) -> InputStatistics:
    found = InputStatistics.empty(inputs.shape[-1], gram=True, device=inputs.device)
    found.add(inputs)
    return found


def correlated(n_tokens: int, n_in: int, seed: int = 0) -> Tensor:
    """Inputs as layers see them: correlated, with features of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in, generator=generator) / n_in**0.5 + torch.eye(n_in)
    scale = torch.exp(torch.randn(n_in, generator=generator))
    return torch.randn(n_tokens, n_in, generator=generator) @ mixing * scale


def with_identity(n_in: int) -> InputStatistics:
    return InputStatistics(n_in, torch.ones(n_in), torch.eye(n_in) * n_in)


# --- statistics ---


def test_statistics_add_up_whatever_the_batches():
    inputs = correlated(60, 5).reshape(3, 20, 5)
    whole, parts = statistics(inputs), InputStatistics.empty(5, gram=True, device=inputs.device)
    for part in inputs:
        parts.add(part)
    rows = inputs.reshape(-1, 5)
    assert torch.allclose(whole.gram, rows.T @ rows, rtol=1e-5)
    assert torch.allclose(parts.gram, whole.gram, rtol=1e-5)
    assert torch.allclose(whole.norm, rows.square().mean(0).sqrt(), rtol=1e-5)
    assert whole.n_tokens == parts.n_tokens == 60


# --- metrics ---


@given(st.floats(0.05, 0.95))
def test_wanda_with_equal_activations_is_magnitude_within_rows(sparsity):
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    equal = with_identity(10)
    assert torch.equal(
        mask(wanda(weight, equal, GENERATOR), sparsity, comparison="output"),
        mask(magnitude(weight, None, GENERATOR), sparsity, comparison="output"),
    )


def test_golden_scores():
    """By hand from the papers' formulas: Wanda eq. 1; RIA eq. 4 with alpha = 1/2."""
    weight = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    inputs = statistics(torch.tensor([[4.0, 1.0], [4.0, 1.0]]))
    assert wanda(weight, inputs, GENERATOR).tolist() == [[4.0, 3.0], [8.0, 2.0]]
    expected = torch.tensor(
        [[(1 / 4 + 1 / 3) * 2, (3 / 4 + 3 / 5) * 1], [(2 / 4 + 2 / 3) * 2, (2 / 4 + 2 / 5) * 1]]
    )
    assert torch.allclose(ria(weight, inputs, GENERATOR), expected)


def test_ria_of_an_empty_row_or_column_is_zero_not_nan():
    weight = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert torch.isfinite(ria(weight, with_identity(2), GENERATOR)).all()


# --- sparsegpt ---


@given(st.sampled_from([0.0, 0.3, 0.5, 0.77, 1.0]), st.sampled_from([4, 5, 64]))
def test_sparsegpt_with_the_identity_as_hessian_is_blockwise_magnitude(sparsity, block_size):
    weight = torch.randn(6, 18, generator=torch.Generator().manual_seed(2))
    found = sparsegpt(LayerProblem(weight, with_identity(18), block_size=block_size), [sparsity])[0]
    expected = weight.clone()
    for start in range(0, 18, block_size):
        block = expected[:, start : start + block_size]
        end = start + block.shape[1]
        count = n_zeros(sparsity, 6 * end) - n_zeros(sparsity, 6 * start)
        block.masked_fill_(lowest(block.abs().reshape(-1), count).reshape(block.shape), 0.0)
    assert torch.allclose(found, expected, atol=1e-6)


def slow_sparsegpt(weight: Tensor, inputs: InputStatistics, sparsity: float, block_size: int) -> Tensor:
    """The paper's algorithm column by column in fp64, every later column updated at once."""
    moment = inputs.gram.double() / inputs.n_tokens
    moment += 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    w = weight.double().clone()
    n_out, n_in = w.shape
    for start in range(0, n_in, block_size):
        end = min(start + block_size, n_in)
        score = (w[:, start:end] / upper.diagonal()[start:end]) ** 2
        count = n_zeros(sparsity, n_out * end) - n_zeros(sparsity, n_out * start)
        gone = lowest(score.reshape(-1), count).reshape(score.shape)
        for j in range(start, end):
            error = torch.where(gone[:, j - start], w[:, j], 0.0) / upper[j, j]
            w[:, j:] -= error[:, None] * upper[j, j:]
            w[gone[:, j - start], j] = 0.0
    return w.float()


@pytest.mark.parametrize("block_size", [16, 40, 128])
def test_sparsegpt_equals_a_slow_readable_reference(block_size):
    weight = torch.randn(12, 100, generator=torch.Generator().manual_seed(3))
    inputs = statistics(correlated(400, 100))
    found = sparsegpt(LayerProblem(weight, inputs, block_size=block_size), [0.25, 0.6])
    for index, sparsity in enumerate((0.25, 0.6)):
        assert torch.allclose(found[index], slow_sparsegpt(weight, inputs, sparsity, block_size), atol=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_sparsegpt_beats_wanda_in_output_error(seed):
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(seed))
    rows = correlated(500, 48, seed)
    inputs = statistics(rows)

    def error(pruned: Tensor) -> float:
        return float((rows @ (pruned - weight).T).square().sum())

    by_wanda = weight * mask(wanda(weight, inputs, GENERATOR), 0.5)
    assert error(sparsegpt(LayerProblem(weight, inputs), [0.5])[0]) < 0.9 * error(by_wanda)


@given(st.floats(0, 1), st.sampled_from([8, 100]))
def test_sparsegpt_prunes_exactly_so_many(sparsity, block_size):
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(4))
    found = sparsegpt(
        LayerProblem(weight, statistics(correlated(90, 30)), block_size=block_size), [sparsity]
    )[0]
    assert int((found == 0).sum()) == n_zeros(sparsity, 210)


def test_sparsegpt_with_groups_and_with_inputs_that_are_always_zero():
    rows = correlated(90, 32)
    rows[:, 5] = 0.0
    weight = torch.randn(7, 32, generator=torch.Generator().manual_seed(5))
    found = sparsegpt(LayerProblem(weight, statistics(rows), group_size=4, block_size=8), [0.5, 0.75])
    assert ((found == 0).reshape(2, 7, 8, 4).sum(-1) == torch.tensor([2, 3])[:, None, None]).all()
    assert torch.isfinite(found).all()
    assert torch.isfinite(sparsegpt(LayerProblem(weight, statistics(torch.zeros(9, 32))), [0.5])).all()


# --- every method ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sequential", [False, True])
def test_every_method_prunes_a_model_exactly(name, sequential):
    anatomy = small_anatomy()
    sparsity = {x.name: (0.0, 0.3, 0.5, 1.0)[i % 4] for i, x in enumerate(anatomy.linears)}
    others = random_tokens(4, 16, 1)
    prune(anatomy, sparsity, Method(name), random_tokens(4, 16), sequential=sequential, contrast=others)
    sizes = {linear.name: linear.n_weights for linear in anatomy.linears}
    assert count_zeros(anatomy) == {x: n_zeros(sparsity[x], sizes[x]) for x in sizes}


OF_THE_DENSE_MODEL = ("mathneuro",)
"""Methods whose statistics are those of the dense model alone, over both texts."""


@pytest.mark.parametrize(
    "name", [name for name in NAMES if Method(name).needs != "nothing" and name not in OF_THE_DENSE_MODEL]
)
def test_sequential_statistics_come_from_pruned_blocks(name):
    """The first block sees the same inputs either way; the second one does not."""
    tokens, pruned = random_tokens(4, 16), {}
    for sequential in (False, True):
        anatomy = small_anatomy()
        sparsity = dict.fromkeys((x.name for x in anatomy.linears), 0.6)
        others = random_tokens(4, 16, 1)
        prune(anatomy, sparsity, Method(name), tokens, sequential=sequential, contrast=others)
        pruned[sequential] = [linear.weight.clone() for linear in anatomy.linears]
    assert all(torch.equal(a, b) for a, b in zip(pruned[False][:3], pruned[True][:3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(pruned[False][7:], pruned[True][7:], strict=True))


def test_the_random_metric_is_seeded_by_seed_and_layer():
    first, second = list(small_anatomy().linears)[:2]
    levels = (0.0, 0.5)
    assert torch.equal(
        Method("random").ranks(first, None, levels), Method("random").ranks(first, None, levels)
    )
    reseeded = Method("random", seed=1).ranks(first, None, levels)
    assert not torch.equal(Method("random").ranks(first, None, levels), reseeded)
    assert first.name != second.name


def test_wrong_names_and_sparsities_are_refused():
    with pytest.raises(ValueError, match=r"Did you mean 'wanda'\?"):
        Method("wandaa")
    with pytest.raises(ValueError, match=r"Expected the name of a projection, got 'x'"):
        prune(small_anatomy(), {"x": 0.5}, Method("magnitude"), random_tokens(1, 8), sequential=False)
    name = next(small_anatomy().linears).name
    with pytest.raises(ValueError, match=r"Expected `sparsity` in \[0, 1\], got 1.5"):
        prune(small_anatomy(), {name: 1.5}, Method("magnitude"), random_tokens(1, 8), sequential=False)
