"""LIAR: removed inputs are interpolated from the kept ones, with a bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.linalg import dampened, leading_solve
from secateur.pruners.structure.refit import RepairInputs


def interpolated(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, "out _"]]:
    """Removed inputs are replaced by their best affine prediction from the kept ones.

    [INFER] LIAR (arXiv 2407.13331) is known by its abstract: kept weights and biases are interpolated linearly, by
    least squares. Here ``W' = W_K + W_R Q``, ``b' = b + W_R (m_R - Q m_K)`` with ``Q = C_RK (C_KK + d)^-1``, d the
    dampening, and the covariance C = G - m m^T: `obs_update` of centred inputs with `mean_bias`'s of the residual. With
    a bias in play that is the optimum; second moments in the place of covariances would fit the weights to the means,
    too.

    Returns:
        For each count the new columns of the weight, and in one more column what to add to the bias.
    """
    assert inputs.second_moment is not None
    mean, weight = inputs.mean.double(), inputs.weight.double()
    moment = dampened(inputs.second_moment - torch.outer(mean, mean), inputs.dampening)
    fitted = leading_solve(moment, weight @ moment, counts, inputs.name)
    biases = [weight @ mean - new @ mean[: new.shape[1]] for new in fitted]
    return [torch.cat([new, bias[:, None]], 1) for new, bias in zip(fitted, biases, strict=True)]
