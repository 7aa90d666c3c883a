"""LLM-BIP: size of a unit's contribution to the output of its sub-layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.structure.evidence import Evidence


def llm_bip(evidence: Evidence) -> Float[Tensor, " units"]:
    """Size of the unit's contribution to its sub-layer's output.

    [INFER] LLM-BIP (arXiv 2412.06419) is known by its abstract: a bound on the change of the block's output. Of a
    channel ``E|a_j| ||W_:j||``; of a KV group the root mean square over tokens of the norm of what its heads add,
    ``sqrt(tr(W_S E[a a^T]_SS W_S^T))``. How far the MLP after the attention can stretch that is one factor for
    all groups of a block, and left out.
    """
    if evidence.layout.unit_width == 1:
        return evidence.weight.square().sum(0).sqrt() * evidence.seen.mean_abs
    return contributions(evidence).diagonal().clamp_min(0.0).sqrt()


def contributions(evidence: Evidence) -> Float[Tensor, "units units"]:
    """Mean over tokens of the inner products of two units' contributions to the output, in fp64."""
    n_units, width = evidence.layout.n_units, evidence.layout.unit_width
    return products(evidence).reshape(n_units, width, n_units, width).sum((1, 3))


def products(evidence: Evidence) -> Float[Tensor, "in in"]:
    """Mean over tokens of the inner products of two columns' contributions: ``(W^T W) o E[a a^T]``."""
    weight = evidence.weight.double()
    return (weight.T @ weight) * evidence.seen.second_moment
