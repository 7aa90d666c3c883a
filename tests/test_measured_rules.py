"""Allocation rules that measure layers: golden shares, and each measure against a slow readable form."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.collected import CalibrationStatistics
from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.alphapruning import (
    N_BINS,
    block_exponents,
    linear_factors,
    spectrum,
    tail_exponent,
)
from secateur.pruners.recipes.allocation.dlp import central_scores
from secateur.pruners.recipes.allocation.dsa import log_variances
from secateur.pruners.recipes.allocation.layers import Layer, RuleEvidence
from secateur.pruners.recipes.allocation.owl import released_outliers
from secateur.pruners.recipes.allocation.sap import pq_index, pq_indices
from secateur.pruners.recipes.context import Sample
from secateur.spaces.recipe.settings import RecipeSettings
from tests.models import random_tokens, small_anatomy
from tests.recipe_layers import shares


@pytest.fixture(scope="module")
def anatomy():
    return small_anatomy(n_layers=2)


@pytest.fixture(scope="module")
def sample(anatomy, tmp_path_factory):
    cache = StatisticsCache(tmp_path_factory.mktemp("statistics"), sys.maxsize)
    tokens = random_tokens(3, 24)
    return Sample(tokens, "toy", CalibrationStatistics(anatomy, tokens, cache, "toy"))


def scores(anatomy, sample, block):
    """Wanda's scores of a block's weights, one after the other."""
    found = []
    for linear in anatomy.blocks[block].linears:
        norm = sample.statistics.inputs(block)[linear.name].norm.numpy()
        found.append((np.abs(linear.weight.numpy()) * norm).ravel())
    return np.concatenate(found)


def of_blocks(anatomy, values):
    """A number a block as one a projection."""
    return [values[linear.block] for linear in anatomy.linears]


def blocks(n=3, size=10_000):
    return [Layer(block, "mlp", 1, size) for block in range(n)]


def found(rule, measured, sparsity, n=3, **parameters):
    layers = blocks(n)
    return shares(layers, allocate(rule, layers, RuleEvidence(measured=measured), sparsity, **parameters))


def test_golden_owl_released():
    """Places 0, 0.2 and 1 between the fewest and the most outliers, mean 0.4, over a range of 0.16 around 30 % kept."""
    expected = [0.7 + 0.16 * 0.4, 0.7 + 0.16 * 0.2, 0.7 - 0.16 * 0.6]
    assert found("owl_released", (0.01, 0.02, 0.06), 0.7) == pytest.approx(expected, abs=1e-4)
    assert found("owl_released", (0.02, 0.02, 0.02), 0.7) == pytest.approx([0.7] * 3, abs=1e-4)


def test_outliers_are_counted_over_a_block(anatomy, sample):
    expected = [np.mean(x > 3 * x.mean()) for x in (scores(anatomy, sample, block) for block in range(2))]
    assert released_outliers(anatomy, sample, owl_m=3.0) == pytest.approx(of_blocks(anatomy, expected))


def test_golden_dlp():
    """Medians 1, 2, 5: importances 7/8, 6/8, 3/8, places 1, 0.75, 0 with mean 7/12, a range of 0.3."""
    places = np.array([1, 0.75, 0]) - 7 / 12
    assert found("dlp", (1.0, 2.0, 5.0), 0.7) == pytest.approx(0.7 - 0.3 * places, abs=1e-4)


@pytest.mark.parametrize("centre", ["median", "mean"])
def test_the_centre_of_a_blocks_scores(anatomy, sample, centre):
    expected = []
    for block in range(2):
        every = np.sort(scores(anatomy, sample, block))
        expected.append(every[(len(every) - 1) // 2] if centre == "median" else every.mean())
    assert central_scores(anatomy, sample, centre=centre) == pytest.approx(
        of_blocks(anatomy, expected), rel=1e-5
    )


def test_golden_atp():
    """beta = 0.5 * 2 * 0.3 / 3."""
    layers = blocks(4)
    gone = allocate("atp", layers, RuleEvidence(), 0.7, slope=0.5)
    assert shares(layers, gone) == pytest.approx([0.55, 0.65, 0.75, 0.85])
    steepest = shares(layers, allocate("atp", layers, RuleEvidence(), 0.7, slope=1.0))
    assert steepest == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert shares(layers, allocate("atp", layers, RuleEvidence(), 0.7, slope=0.0)) == pytest.approx([0.7] * 4)


def test_golden_alphapruning():
    """Factors 0.7, 1 and 1.3 of exponents 2, 3 and 4."""
    assert found("alphapruning", (2.0, 3.0, 4.0), 0.6) == pytest.approx([0.42, 0.6, 0.78], abs=1e-4)
    assert linear_factors(np.array([2.0, 5.0, 4.0]), 0.2) == pytest.approx([0.8, 1.2, 0.8 + 0.4 * 2 / 3])


def slow_exponent(values):
    """Hill's estimator for every beginning near the peak of the histogram of logarithms; the one that fits best."""
    counts, edges = np.histogram(np.log10(values), N_BINS)
    peak = 10 ** edges[counts.argmax()]
    fits = []
    for start, lowest in enumerate(values[:-1]):
        if 0.95 * peak <= lowest <= 1.5 * peak:
            tail = values[start:]
            alpha = 1 + len(tail) / np.sum(np.log(tail / lowest))
            expected = 1 - (tail / lowest) ** (1 - alpha)
            fits.append((np.abs(expected - np.arange(len(tail)) / len(tail)).max(), alpha))
    return min(fits)[1]


@pytest.mark.parametrize("shape", [(60, 200), (120, 120), (300, 64)])
def test_exponents_are_those_of_the_slow_form(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = spectrum(weight)
    assert values.numpy() == pytest.approx(np.sort(np.linalg.svd(weight.double().numpy())[1] ** 2))
    assert tail_exponent(values) == pytest.approx(slow_exponent(values.numpy()), rel=1e-6)
    assert tail_exponent(values * 1e-4) == pytest.approx(tail_exponent(values), rel=1e-6)


def test_the_exponent_of_a_power_law_is_found():
    for alpha in (2.0, 3.5):
        places = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        assert tail_exponent((1 - places) ** (1 / (1 - alpha))) == pytest.approx(alpha, rel=0.03)


def test_exponents_are_meant_over_a_block(anatomy, sample):
    expected = [
        np.mean([tail_exponent(spectrum(linear.weight)) for linear in block.linears])
        for block in anatomy.blocks
    ]
    assert block_exponents(anatomy, sample) == pytest.approx(of_blocks(anatomy, expected))
    assert expected[0] != expected[1]


def test_pq_index_by_hand():
    """||(3, 4, 0, 0)|| is (sqrt(3) + 2)^2 at p = 1/2 and 7 at q = 1; the factor is 4^(1 - 2)."""
    assert pq_index(torch.tensor([3.0, -4.0, 0.0, 0.0]), 0.5, 1.0) == pytest.approx(
        1 - (3**0.5 + 2) ** 2 / 28
    )
    assert pq_index(torch.tensor([2.0, -2.0, 2.0]), 0.5, 1.0) == pytest.approx(0.0, abs=1e-6)
    assert pq_index(torch.tensor([0.0, 5.0, 0.0, 0.0]), 0.5, 1.0) == pytest.approx(0.75)
    assert pq_index(torch.tensor([0.0, 0.0]), 0.5, 1.0) == 0.0


def test_pq_indices_are_of_each_projection(anatomy, sample):
    expected = []
    for linear in anatomy.linears:
        w = np.abs(linear.weight.numpy().astype(np.float64)).ravel()
        expected.append(1 - w.size ** (1 / 2 - 1 / 0.5) * np.sum(w**0.5) ** 2 / np.sqrt(np.sum(w**2)))
    assert pq_indices(anatomy, sample, pq_p=0.5, pq_q=2.0) == pytest.approx(expected, rel=1e-5)


def test_golden_sap():
    """With p = 1/2 and q = 1 a layer loses gamma I, and 90 % at most."""
    assert found("sap", (0.2, 0.5), 0.35, n=2) == pytest.approx([0.2, 0.5], abs=1e-4)
    assert found("sap", (0.2, 0.5), 0.7, n=2) == pytest.approx([0.5, 0.9], abs=1e-4)
    # a slack of 1 halves twice what remains, 1 - I of q / (q - p) = 2: 1 - (1 - I) / 4 is 0.8 and 0.875
    eta = found("sap", (0.2, 0.5), 0.67, n=2, eta=1.0)
    assert eta[0] / eta[1] == pytest.approx(0.8 / 0.875, abs=1e-3)


def test_golden_dsa():
    """The arcsine is taken of 1 where the arctangent is more."""
    redundancy = np.arcsin(np.minimum(np.arctan([0.5, 1.0, 2.0]), 1))
    places = (redundancy - redundancy[0]) / np.ptp(redundancy)
    expected = 0.7 + 0.16 * (places - places.mean())
    assert found("dsa", (0.5, 1.0, 2.0), 0.7) == pytest.approx(expected, abs=1e-4)


def test_the_variance_of_logarithms(anatomy, sample):
    expected = [np.var(np.log(scores(anatomy, sample, block)), ddof=1) for block in range(2)]
    assert log_variances(anatomy, sample) == pytest.approx(of_blocks(anatomy, expected), rel=1e-4)


def test_searches_try_the_rules_that_they_tried_before():
    tried = {unit: RecipeSettings(unit=unit).allocation_options for unit in ("weights", "structure")}
    assert tried["weights"] == ("uniform", "global", "cfsp", "adapt", "owl")
    assert tried["structure"] == ("uniform", "global", "flap", "nirvana", "cfsp", "adapt")
