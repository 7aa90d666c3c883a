"""Importances of units from gradients of the dense model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.models.anatomy import Linear
from secateur.pruners.models.layout import Placement
from secateur.pruners.structure.evidence import Evidence


def taylor(evidence: Evidence) -> Float[Tensor, " units"]:
    """First-order effect of removal: sum of ``|w g|`` over all weights of the unit.

    LLM-Pruner's element-wise first order (Ma et al. 2023, arXiv 2305.11627), summed over the coupled rows of q, k, v
    or gate, up and columns of o or down. Here g is the root mean square of the gradient over the calibration
    windows, where LLM-Pruner takes the gradient of their mean loss: that is `llm_pruner_first`.
    """
    return evidence.weight_sums(lambda x: x.weight.float().abs() * evidence.gradient("rms", x))


def first_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``|w g|`` over all weights of the unit, g the gradient of the mean loss.

    LLM-Pruner (Ma et al. 2023, arXiv 2305.11627), element-wise, first order; coupled matrices are summed, the
    released code's default.
    """
    return evidence.weight_sums(lambda x: _first(evidence, x).abs())


def vector_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum over the unit's rows and columns of ``|sum of w g|``: LLM-Pruner's vector-wise first order.

    Effects of one row (a column of output projections) may cancel; see `first_order` for the rest.
    """
    return evidence.unit_sums(
        lambda placement: _first(evidence, placement.linear).sum(1 - placement.axis).abs()
    )


def second_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``w^2 F`` over all weights of the unit: LLM-Pruner's second order, element-wise.

    F is the diagonal of the empirical Fisher matrix, the mean over all calibration windows of the squared gradient.
    """
    return evidence.weight_sums(lambda x: _second(evidence, x))


def mixed_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``|w g - w^2 F / 2|`` over all weights of the unit: LLM-Pruner's mixed order, element-wise.

    The sign is that of the paper's equation 5, a loss's change when w goes. The released code's attention branch
    does not run on it; here attentions and MLPs are treated alike.
    """
    return evidence.weight_sums(lambda x: (_first(evidence, x) - _second(evidence, x) / 2).abs())


def nirvana(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``|w df/dw|`` over all weights of the unit, f the mean over windows of the logits' peaks.

    NIRVANA (arXiv 2509.14230): f is the mean over vocabulary and windows of the largest logit over a window's
    positions, so that no labels are needed. Its split of the budget between attentions and MLPs is no part of this.
    """
    return evidence.weight_sums(lambda x: (x.weight.float() * evidence.gradient("logits", x)).abs())


def mini_llm(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``|w| ||x|| |g|`` over the unit's columns of the output projection, g estimated by forward passes alone.

    [INFER] MINI-LLM (arXiv 2407.11681) is known by its abstract: a feature map's sensitivity, of weight magnitude,
    activation and a gradient by `zeroth_order.estimate_gradients`. The feature map of a unit is what it gives to
    the output projection, so the weights that see it are the ones that count.
    """
    gradient = evidence.gradient("forward", evidence.layout.output)
    return evidence.by_unit((evidence.weight * gradient).abs().sum(0) * evidence.seen.norm).sum(1)


def bonsai(evidence: Evidence) -> Float[Tensor, " units"]:
    """What leaving out the unit adds to the loss, see `perturbation.perturbation_scores`."""
    return evidence.gradient("perturbed", evidence.layout.output)


def saap(evidence: Evidence) -> Float[Tensor, " units"]:
    """Coarse and fine first-order scores, each weighted by how sure it is.

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
    """The score over twice its variance; with one window, which has none, over a trifle of the mean square."""
    variance = noise.mean() + 1e-6 * score.square().mean()
    return score / (2 * variance).clamp_min(torch.finfo(torch.float32).tiny)


def _first(evidence: Evidence, linear: Linear) -> Float[Tensor, "out in"]:
    return linear.weight.float() * evidence.gradient("mean", linear)


def _second(evidence: Evidence, linear: Linear) -> Float[Tensor, "out in"]:
    return (linear.weight.float() * evidence.gradient("rms", linear)).square()


def _variance(evidence: Evidence, linear: Linear) -> Float[Tensor, "out in"]:
    """Of ``w g`` over the windows."""
    return (_second(evidence, linear) - _first(evidence, linear).square()).clamp_min(0.0)


def _variance_of_sums(evidence: Evidence, placement: Placement) -> Float[Tensor, " axis"]:
    """Of the sum of ``w g`` along a row or column over the windows."""
    mean = _first(evidence, placement.linear).sum(1 - placement.axis)
    return (evidence.gradient("sums", placement.linear).square() - mean.square()).clamp_min(0.0)
