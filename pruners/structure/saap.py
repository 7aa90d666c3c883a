"""SAAP: coarse and fine first-order scores, each weighted by its certainty."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.models.anatomy import Linear
from secateur.pruners.models.placement import Placement
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.llm_pruner import first, mixed_order, second, vector_order


def saap(evidence: Evidence) -> Float[Tensor, " units"]:
    """Coarse and fine first-order scores, each weighted by its certainty.

    [INFER] SAAP (arXiv 2412.15127) is known by its abstract: a fusion of importances with homoscedastic uncertainty.
    Here ``I_c / (2 s_c^2) + I_f / (2 s_f^2)``, with I_c of `vector_order` and I_f of `mixed_order`. s^2 is the
    variance over calibration windows of what they sum up, one number a sub-layer (the mean over its units): of the
    sums of ``w g`` along rows (columns) for I_c, of each ``w g`` for I_f. The term ``log s_c s_f`` and the
    standardisation over a layer move all units of a sub-layer alike, and are left out.
    """
    coarse_noise = evidence.unit_sums(lambda placement: _variance_of_sums(evidence, placement))
    fine_noise = evidence.weight_sums(lambda x: _variance(evidence, x))
    return _sure(vector_order(evidence), coarse_noise) + _sure(mixed_order(evidence), fine_noise)


def _sure(score: Float[Tensor, " units"], noise: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """The score over twice its variance; with one window, which has none, over 1e-6 of the mean square."""
    variance = noise.mean() + 1e-6 * score.square().mean()
    return score / (2 * variance).clamp_min(torch.finfo(torch.float32).tiny)


def _variance(evidence: Evidence, linear: Linear) -> Float[Tensor, "out in"]:
    """Variance of ``w g`` over the windows."""
    return (second(evidence, linear) - first(evidence, linear).square()).clamp_min(0.0)


def _variance_of_sums(evidence: Evidence, placement: Placement) -> Float[Tensor, " axis"]:
    """Variance over the windows of the sum of ``w g`` along a row or column."""
    mean = first(evidence, placement.linear).sum(1 - placement.axis)
    return (evidence.gradient("sums", placement.linear).square() - mean.square()).clamp_min(0.0)
