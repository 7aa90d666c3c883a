"""NIRVANA's allocation: one threshold for attentions, another for MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from secateur.pruners.recipes.allocation.filling import meet, pace, wanted_weights
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence
from secateur.pruners.recipes.allocation.threshold import threshold


def nirvana(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, gamma: float) -> Ints:
    """One threshold for all attentions and another for all MLPs, which lose `gamma` times the share.

    NIRVANA (arXiv 2509.14230): with A the weights of attentions and M those of MLPs,
    f_attention = s (A + M) / (A + gamma M) and f_mlp = gamma f_attention. As there, each layer keeps a unit; the
    paper's 8 channels, and widths that are multiples of 8, would miss the budget. If the MLPs can't lose as much
    the attentions lose the rest.

    Args:
        gamma: 3.36 for Llama-3.1-8B, 3.0 for Llama-3.2-3B.
    """
    layers = [replace(layer, keep=max(layer.keep, 1)) for layer in layers]
    wanted = wanted_weights(layers, sparsity)
    ratio = np.array([1.0 if layer.kind == "attention" else gamma for layer in layers])
    shares = meet(layers, ratio, wanted)
    gone, left = np.zeros(len(layers), np.int64), float(wanted)
    for kind in ("attention", "mlp"):  # the many small channels round off the few large groups
        pool = [index for index, layer in enumerate(layers) if layer.kind == kind]
        if pool:
            members = [layers[index] for index in pool]
            share = sum(shares[index] * pace(layers[index]) for index in pool)
            able = sum(layer.removed(layer.n_free) for layer in members)
            goal = min(round(share if kind == "attention" else left), able)
            gone[pool] = threshold(members, [layer.scores for layer in members], goal)
            left -= sum(layer.removed(n) for layer, n in zip(members, gone[pool].tolist(), strict=True))
    return gone
