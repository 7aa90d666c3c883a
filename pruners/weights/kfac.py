"""K-FAC saliency: what pruning a weight costs when the others follow, by Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.linalg import inverse_factor


def kfac(
    weight: Float[Tensor, "out in"],
    inputs: InputStatistics,
    generator: torch.Generator,  # unused
    *,
    gradients: Mapping[Kind, Float[Tensor, " out"]],
    windows: tuple[int, int] = (0, 0),  # unused
    dampening: float = 0.01,
) -> Float[Tensor, "out in"]:
    """Loss in nats a token of pruning each weight alone, all others of the projection updated for it.

    ``w_ij^2 / (2 [B^-1]_ii [A^-1]_jj)``: the saliency of the optimal brain surgeon (Hassibi and Stork 1993) with the
    Fisher information B x A of K-FAC, whose inverse is B^-1 x A^-1; A is the second moment of the inputs, B that of the
    gradients of the outputs for labels drawn from the model's own distribution. It is the cost that The LLM Surgeon
    (van der Ouderaa et al. 2024, arXiv 2312.17244, eq. 9) ranks weights by, there with the text's own labels; without
    its updates and shots, which `llm_surgeon` has. In one unit in all layers, so the rule `global` may compare them.

    Args:
        weight: dense.
        inputs: with their Gram matrix.
        generator: unused.
        gradients: ``fisher``, see `fisher.output_costs`.
        dampening: added to the diagonal of A, as a fraction of its mean; that of B is `fisher.OUTPUT_DAMPENING`.
    """
    inverse = inverse_factor(inputs, dampening, "the weight").square().sum(0)
    costs = gradients["fisher"].to(weight.device)
    return weight.float().square() * costs[:, None] / (2 * inverse[None, :])
