"""D-Pruner: importance by the loss on a domain, regularised by the importance on a general text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind, cross_entropy
from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.calibration.window_gradients import add_over_windows, backward_bytes
from secateur.pruners.linalg import inverse_factor
from secateur.pruners.models.anatomy import Anatomy, Linear

LAMBDA, RATE, DAMPENING = 0.1, 0.03, 0.01
"""Weight of the regulariser, learning rate of its step, and dampening, as released."""


def d_pruner(
    weight: Float[Tensor, "out in"],
    inputs: InputStatistics | None,
    generator: torch.Generator,
    *,
    gradients: Mapping[Kind, Float[Tensor, "out in"]] | None = None,
    windows: tuple[int, int] = (0, 0),
    dampening: float = 0.0,  # its own
) -> Float[Tensor, "out in"]:
    """The mean of `regularised_importance`, compared over the layer (Zhang et al. 2024, arXiv 2405.06275).

    Use it to keep a domain, the calibration text, and what language needs in general, the contrast text.

    Args:
        gradients: of the weight, with the regularised importance.
    """
    assert gradients is not None, "collected where the table says that the metric needs them"
    return gradients["regularised"].to(weight.device)


def regularised_importance(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], contrast: Int[Tensor, "others _"]
) -> dict[str, Float[Tensor, "out in"]]:
    """Mean over the N windows of ``|g' w + (g' w)^2 / 2 N|``, with ``g' = g + 2 lambda alpha^2 G g^2 / N``.

    g is the gradient of a window's loss, g' that of the loss with the regulariser ``lambda sum G (alpha g)^2``, which
    holds weights that matter in general: G is their importance by optimal brain surgery on the contrast windows,
    `general_importance`. In the released code N, 1000, stands in the last term alike.

    Differences from the released code: there the model is trained for five epochs meanwhile, and gradients are those
    of batches on the way; here they are of the dense model, a window each. [INFER] alpha is the largest learning
    rate. The third-order remainder of the expansion, for which it adds ``w^3``, is left out.

    Args:
        anatomy: the dense model; not changed.
        tokens: windows of the domain.
        contrast: windows of the general text.

    Returns:
        For each projection by its full name, in fp32 on its device.

    Raises:
        ValueError: if it is not finite.
    """
    n_windows, general = len(tokens), general_importance(anatomy, contrast)

    def of_window(linear: Linear, gradient: Tensor) -> Tensor:
        pull = 2 * LAMBDA * RATE**2 * general[linear.name] * gradient.square() / n_windows
        first = (gradient + pull) * linear.weight
        return (first + first.square() / (2 * n_windows)).abs()

    found = {x.name: torch.zeros_like(x.weight, dtype=torch.float32) for x in anatomy.linears}
    add_over_windows(anatomy, tokens, cross_entropy, [(of_window, found)])
    for name, total in found.items():
        if not torch.isfinite(total).all():
            raise ValueError(
                f"Expected finite gradients, got NaN or infinity at {name}. Check the calibration text."
            )
        total.div_(n_windows)
    return found


@torch.no_grad()
def general_importance(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"]
) -> dict[str, Float[Tensor, "out in"]]:
    """``w^2 / U_jj^2`` with U the Cholesky factor of the inverse of ``2 / N sum x x^T``, N the number of windows.

    SparseGPT's score, by which the released code ranks what is important in general; without the sweep that updates
    later columns, which it carries out at a sparsity that it fixes.
    """
    found = {}
    for part in stream_blocks(anatomy, tokens, inputs="gram"):
        scales = dict[int, Tensor]()
        for linear in part.block.linears:
            inputs = part.inputs[linear.name]
            if id(inputs) not in scales:
                scales[id(inputs)] = inverse_factor(inputs, DAMPENING, linear.name).diagonal().square()
            found[linear.name] = 2 * tokens.shape[1] * linear.weight.float().square() / scales[id(inputs)]
    return found


def regularised_bytes(anatomy: Anatomy, length: int) -> int:
    """About the memory of `regularised_importance` beyond the model, in bytes, for windows of so many tokens."""
    widest = max(linear.in_features for linear in anatomy.linears)
    return backward_bytes(anatomy, 8, length) + 16 * widest**2
