"""LLM-Pruner: first- and second-order effects of units on the loss, and sums of their weights."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.models.anatomy import Linear
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
    return evidence.weight_sums(lambda x: first(evidence, x).abs())


def vector_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum over the unit's rows and columns of ``|sum of w g|``: LLM-Pruner's vector-wise first order.

    Effects of one row (a column of output projections) may cancel; see `first_order` for the rest.
    """
    return evidence.unit_sums(
        lambda placement: first(evidence, placement.linear).sum(1 - placement.axis).abs()
    )


def second_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``w^2 F`` over all weights of the unit: LLM-Pruner's second order, element-wise.

    F is the diagonal of the empirical Fisher matrix, the mean over all calibration windows of the squared gradient.
    """
    return evidence.weight_sums(lambda x: second(evidence, x))


def mixed_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``|w g - w^2 F / 2|`` over all weights of the unit: LLM-Pruner's mixed order, element-wise.

    The sign is that of the paper's equation 5, a loss's change when w is removed. The released code's attention branch
    does not run on it; here attentions and MLPs are treated alike.
    """
    return evidence.weight_sums(lambda x: (first(evidence, x) - second(evidence, x) / 2).abs())


def first(evidence: Evidence, linear: Linear) -> Float[Tensor, "out in"]:
    """``w g`` of each weight, g of the mean loss."""
    return linear.weight.float() * evidence.gradient("mean", linear)


def second(evidence: Evidence, linear: Linear) -> Float[Tensor, "out in"]:
    """``w^2 F`` of each weight."""
    return (linear.weight.float() * evidence.gradient("rms", linear)).square()


def l1(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``|w|`` over all weights of the unit: LLM-Pruner's l1 (Ma et al. 2023, arXiv 2305.11627)."""
    return evidence.weight_sums(lambda x: x.weight.float().abs())


def l2(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``w^2`` over all weights of the unit: LLM-Pruner's l2 (Ma et al. 2023, arXiv 2305.11627)."""
    return evidence.weight_sums(lambda x: x.weight.float().square())
