"""MathNeuro: weights that are important for a task and not for a general text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.pruners.weights.method import LayerProblem
from secateur.spaces.levels import n_zeros


def mathneuro(layer: LayerProblem, sparsities: Sequence[float]) -> Float[Tensor, "levels out in"]:
    """The weight without what is specific to the task, the calibration text (Christ et al. 2024, arXiv 2410.16930).

    A weight's importance for a text is ``|w|`` times its input's norm in a window, summed over the windows. Of a share
    p, the weights are specific that are in the first p of the layer by their importance for the task, and are not by
    that for the contrast text; they are zeroed, which removes a skill and little else. p is here the smallest share
    with as many specific weights as the sparsity asks for, and of these the most important for the task go, so that
    the paper's set of p is the result at its own size.

    No share has many: none has more than p (1 - p) if the two rankings are independent. Ours, beyond the largest set:
    the other weights go by ascending importance for the contrast text, so that every sparsity has a result.

    Args:
        layer: with ``window_norms`` of both calibration sets in its gradients.
        sparsities: of the layer.
    """
    size, absolute = layer.weight.abs().float(), layer.gradients
    task = size * absolute["window_norms"].to(size.device)
    general = size * absolute["contrast_window_norms"].to(size.device)
    by_task, by_general = (_places(score) for score in (task, general))
    found = []
    for sparsity in sparsities:
        gone = _gone(by_task, by_general, n_zeros(sparsity, size.numel()))
        found.append(layer.weight.masked_fill(gone.reshape(size.shape), 0))
    return torch.stack(found)


def specific(
    by_task: Int[Tensor, " weights"], by_general: Int[Tensor, " weights"], n_first: int
) -> Bool[Tensor, " weights"]:
    """True of the weights among so many first by the task that are not among as many first in general."""
    return (by_task < n_first) & (by_general >= n_first)


def _gone(
    by_task: Int[Tensor, " weights"], by_general: Int[Tensor, " weights"], n_gone: int
) -> Bool[Tensor, " weights"]:
    """True of so many weights that are zeroed."""
    n_first = _smallest(by_task, by_general, n_gone)
    chosen = specific(by_task, by_general, n_first)
    # Of the set the first by the task; of the others the last in general.
    order = torch.where(chosen, by_task, 2 * len(by_task) - by_general)
    gone = torch.zeros_like(chosen)
    gone[order.argsort(stable=True)[:n_gone]] = True
    return gone


def _smallest(by_task: Int[Tensor, " weights"], by_general: Int[Tensor, " weights"], n_gone: int) -> int:
    """The smallest number of first weights with so many specific ones, or with the most."""
    size = len(by_task)
    # A weight is specific for all numbers in (by_task, by_general]: the sizes of all sets from their ends.
    ends = torch.zeros(size + 2, dtype=torch.int64, device=by_task.device)
    inside = by_task < by_general
    ones = torch.ones_like(by_task[inside])
    ends.scatter_add_(0, by_task[inside] + 1, ones).scatter_add_(0, by_general[inside] + 1, -ones)
    sizes = ends.cumsum(0)
    enough = (sizes >= n_gone).nonzero()
    return int(enough[0]) if len(enough) else int(sizes.argmax())


def _places(score: Float[Tensor, "out in"]) -> Int[Tensor, " weights"]:
    """Places of the weights in the order of importance, the most important first; of equal ones by position."""
    order = score.flatten().argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
