"""Allocation by thresholds for scores: what is pooled, and how."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import Layer, RuleEvidence
from tests.recipe_layers import sublayers, wanted


def one_by_one(layers, rows, target):
    """Removes what scores least, one after the other, as long as it fits."""
    units = sorted((float(score), i) for i, row in enumerate(rows) for score in row)
    gone, left = [0] * len(layers), target
    skipped = set()
    for _, i in units:
        if i in skipped or gone[i] == layers[i].n_free:
            continue
        cost = layers[i].removed(gone[i] + 1) - layers[i].removed(gone[i])
        if cost > left:
            skipped.add(i)
        else:
            gone[i], left = gone[i] + 1, left - cost
    return gone, left


@settings(max_examples=30)
@given(sparsity=st.floats(0, 0.8), cost=st.sampled_from([-1.0, 0.0, 1.0]), seed=st.integers(0, 50))
def test_one_threshold_removes_what_scores_least(sparsity, cost, seed):
    layers = [replace(layer, keep=1) for layer in sublayers(seed=seed, rest=0)]
    rows = [layer.scores * (layer.size / 6) ** cost for layer in layers]
    expected, left = one_by_one(layers, rows, wanted(layers, sparsity))
    gone = allocate("global", layers, RuleEvidence(), sparsity, cost=cost)
    one_more = {layer.size for layer, n in zip(layers, expected, strict=True) if n < layer.n_free}
    nearer = left > 0 and 2 * left >= min(one_more, default=math.inf)
    assert np.subtract(gone, expected).sum() == np.abs(np.subtract(gone, expected)).sum() == nearer


def test_scores_are_comparable_behind_a_normalisation():
    layers = [
        Layer(1, "mlp", 2, 4, np.array([1.0, 2.0, 3.0, 4.0])),
        Layer(2, "mlp", 2, 4, np.array([10.0, 10.0, 10.0, 50.0])),
    ]
    by = {
        name: allocate("global", layers, RuleEvidence(), 0.25, normalise=name)
        for name in ("none", "mean", "max")
    }
    # means 2.5 and 20: 0.4, 0.8, 1.2, 1.6 and 0.5, 0.5, 0.5, 2.5; largest 4 and 50: 0.25, 0.5 ... and 0.2 three times
    assert by == {"none": (2, 0), "mean": (1, 1), "max": (0, 2)}
    # standardised -1.34, -0.45, ... and -0.58 three times; over the length 5.48 and 52.9: 0.18, 0.37 ... and 0.19
    for name in ("zscore", "l2"):
        assert allocate("global", layers, RuleEvidence(), 0.25, normalise=name) == (1, 1)


@pytest.mark.parametrize("cost", [-1.0, 0.5, 1.0])
@pytest.mark.parametrize("normalise", ["none", "zscore"])
def test_a_cost_protects_large_units_whatever_the_sign_of_scores(normalise, cost):
    scores = np.random.default_rng(0).lognormal(size=72) - 100 * (normalise == "none")
    layers = [Layer(0, "attention", 10, 8, scores[:8]), Layer(0, "mlp", 5, 64, scores[8:])]
    large = [
        allocate("global", layers, RuleEvidence(), 0.3, normalise=normalise, cost=c)[0] for c in (0, cost)
    ]
    assert (large[1] < large[0]) if cost > 0 else (large[1] > large[0])


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_numerical_prunings_masks_are_pooled_as_published(sparsity):
    rng = np.random.default_rng(1)
    alpha, n_units, width = 16, (6, 64), (8, 1)
    layers, masks = [], []
    for block in range(3):
        for kind, n, columns in zip(("attention", "mlp"), n_units, width, strict=True):
            size = n * columns
            x = rng.normal(size=(200, size)) * 10.0**block  # energies of blocks are far apart
            a = x.T @ x / len(x)
            penalty, r = 1e9 * a.trace(), (1 - sparsity) * size
            z = np.linalg.solve(a + penalty, a.sum(1) + penalty * r)
            u = np.linalg.solve(a, np.ones(size)).reshape(n, columns).mean(1)
            masks.append(z.reshape(n, columns).mean(1) * (alpha if kind == "attention" else 1))
            layers.append(Layer(block, kind, alpha if kind == "attention" else 1, n, -u))
    gone = allocate("global", layers, RuleEvidence(), sparsity, normalise="mask", cost=1)
    threshold = max(np.sort(mask)[n - 1] for mask, n in zip(masks, gone, strict=True) if n)
    assert all(
        np.sort(mask)[n] >= threshold - 1e-6 for mask, n in zip(masks, gone, strict=True) if n < len(mask)
    )
    assert min(gone[1::2]) > 0, "no block's scale decides"


@settings(max_examples=30)
@given(sparsity=st.floats(0, 1), seed=st.integers(0, 50))
def test_samples_that_are_all_scores_give_the_exact_threshold(sparsity, seed):
    rng = np.random.default_rng(seed)
    layers = [Layer(0, kind, 1, n, rng.normal(size=n)) for kind, n in (("attention", 300), ("mlp", 500))]
    exact = allocate("global", layers, RuleEvidence(), sparsity)
    lowest = np.sort(np.concatenate([layer.scores for layer in layers]))[: sum(exact)]
    assert exact == tuple(int((layer.scores <= lowest[-1]).sum()) if lowest.size else 0 for layer in layers)
    repeated = [
        replace(layer, n_units=10 * layer.n_units) for layer in layers
    ]  # each score stands for ten weights
    tenfold = allocate("global", repeated, RuleEvidence(), sparsity)
    assert np.abs(np.subtract(tenfold, np.multiply(exact, 10))).max() <= 10


def test_golden_flap():
    """By hand: of 2 x (2 groups of 4 weights, 4 channels of 1.. here 2): 24 weights, a third is 8 of them."""
    layers = sublayers(2, 2, 4, group=4, channel=2, rest=0)
    flap = tuple(map(np.array, ([9.0, 9.0], [-1.5, 0.3, 0.5, 0.7], [-0.4, 0.4], [-1.7, -0.1, 0.8, 1.0])))
    # ascending: -1.7 (2), -1.5 (2), -0.4 (4) = 8; a group counts for two channels
    assert allocate("flap", layers, RuleEvidence(flap=flap), 1 / 4) == (0, 1, 1, 1)
    assert allocate("flap", layers, RuleEvidence(flap=flap), 1 / 8) == (0, 1, 0, 1)
    # 6 weights: the group does not fit, the next channel does
    assert allocate("flap", layers, RuleEvidence(flap=flap), 6 / 32) == (0, 1, 0, 2)


def test_golden_nirvana_of_llama_3_1_8b_at_one_half():
    """Card: gamma 3.36, 32 blocks of 8 KV groups with 4 query heads of 128, 14336 channels: 17.2 % and 57.8 %."""
    width, group, channel = 4096, 2 * 128 * (4 + 1), 3
    layers = sublayers(32, 8, 14336, group * width, channel * width, rest=0)
    gone = allocate("nirvana", layers, RuleEvidence(), 0.5)
    assert sum(gone[::2]) / (32 * 8) == pytest.approx(0.172, abs=0.002)
    assert sum(gone[1::2]) / (32 * 14336) == pytest.approx(0.578, abs=0.0005)
    assert all(n < layer.n_units for n, layer in zip(gone, layers, strict=True))
    attention = np.concatenate([layer.scores for layer in layers[::2]])
    threshold = np.sort(attention)[sum(gone[::2]) - 1]
    assert gone[::2] == tuple(int((layer.scores <= threshold).sum()) for layer in layers[::2])


def test_attentions_lose_the_rest_where_gamma_asks_too_much_of_mlps():
    layers = sublayers()
    gone = allocate("nirvana", layers, RuleEvidence(), 0.7, gamma=50.0)
    assert gone[1::2] == (31,) * 4  # all but one
    assert sum(gone[::2]) > 0
