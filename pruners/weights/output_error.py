"""What a mask does to the outputs of a layer, from second moments of its inputs: no forward pass."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def squared_output(weight: Float[Tensor, "rows in"], gram: Float[Tensor, "..."]) -> float:
    """``tr(W G W^T)``: the mean over tokens of the squared norm of the rows' outputs.

    Args:
        weight: rows of a layer, or what is missing of them.
        gram: mean over tokens of ``x x^T``, ``in in``; or its diagonal, ``in``, as if inputs were uncorrelated.
    """
    seen = weight @ gram if gram.ndim == 2 else weight * gram
    return float(torch.dot(seen.reshape(-1), weight.reshape(-1)))


def relative_output_error(
    weight: Float[Tensor, "rows in"],
    kept: Bool[Tensor, "rows in"],
    gram: Float[Tensor, "..."],
    whole: float,
) -> float:
    """``sqrt(tr((W - W*M) G (W - W*M)^T) / tr(W G W^T))``, the norm of the output's error over that of the output.

    The layer-wise error that SparseGPT reconstructs against (arXiv 2301.00774, eq. 1), relative.

    Args:
        weight: rows of a layer.
        kept: their mask.
        gram: see `squared_output`.
        whole: `squared_output` of the weight; a layer whose output is zero has no error.
    """
    missing = squared_output(weight.masked_fill(kept, 0), gram)
    return (max(missing, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
