"""Layers of toy models for the tests of allocation rules."""

from __future__ import annotations

import numpy as np

from secateur.pruners.recipes.allocation.layers import Entry, Layer, RuleEvidence
from secateur.spaces.levels import n_zeros


def sublayers(n_blocks=4, groups=4, channels=32, group=40, channel=6, rest=2, seed=0):
    """Blocks of an attention and an MLP, with scores of two scales."""
    rng = np.random.default_rng(seed)
    found = []
    for block in range(n_blocks):
        found.append(Layer(block, "attention", group, groups, rng.gamma(2, 100, groups), rest=rest))
        found.append(Layer(block, "mlp", channel, channels, rng.gamma(2, 1, channels), rest=rest))
    return found


def linears(n_blocks=3, sizes=(4000, 9000), n_scores=200, seed=0):
    """An attention's and an MLP's linear in each block, with a sample of their scores."""
    rng = np.random.default_rng(seed)
    return [
        Layer(block, kind, 1, size, rng.gamma(2, 1 + block, n_scores), name=f"layers.{block}.{kind}")
        for block in range(n_blocks)
        for kind, size in zip(("attention", "mlp"), sizes, strict=True)
    ]


def evidence_of(layers, seed=0):
    """All that rules ask for."""
    rng = np.random.default_rng(seed)
    n_blocks = max(layer.block for layer in layers) + 1
    return RuleEvidence(
        influence=tuple(rng.uniform(0.01, 0.4, n_blocks)),
        flap=tuple(rng.normal(size=layer.n_units) for layer in layers if layer.size > 1),
        measured=tuple(rng.uniform(0.05, 0.9, len(layers))),
        outliers=tuple(rng.uniform(0, 0.1, len(layers))),
        profile=tuple(
            Entry(block, None, None, share) for block, share in enumerate(rng.uniform(0.1, 1, n_blocks))
        ),
    )


def removed(layers, gone):
    return sum(layer.removed(n) for layer, n in zip(layers, gone, strict=True))


def wanted(layers, sparsity):
    return n_zeros(sparsity, sum(layer.n_weights for layer in layers))


def shares(layers, gone):
    return [n / layer.n_units for layer, n in zip(layers, gone, strict=True)]
