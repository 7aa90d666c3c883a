"""Kinds of gradients of the calibration windows: a registry of plain accumulators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.models.anatomy import Linear
from secateur.spaces.method import Gradients

Kind: TypeAlias = Gradients
"""Rows of `KINDS`, of `pass_kinds.PASS_KINDS`, which have passes of their own, or of `pass_kinds.CONTRAST_KINDS`."""

Value: TypeAlias = Callable[[Float[Tensor, "length vocab"], Int[Tensor, " length"]], Float[Tensor, ""]]


def cross_entropy(logits: Float[Tensor, "length vocab"], tokens: Int[Tensor, " length"]) -> Float[Tensor, ""]:
    """Mean over the window of the next token's, in nats."""
    return F.cross_entropy(logits[:-1].float(), tokens[1:].to(logits.device))


def peak_logits(logits: Float[Tensor, "length vocab"], tokens: Int[Tensor, " length"]) -> Float[Tensor, ""]:
    """Mean over the vocabulary of the largest logit over the window's positions (NIRVANA, arXiv 2509.14230)."""
    return logits.float().amax(0).mean()


@dataclass(frozen=True)
class GradientKind:
    """A row of the registry.

    Args:
        value: differentiated function of a window's logits and tokens; kinds of one value share a pass.
        of_window: summand of a window, from a projection and its ``out in`` gradient.
        root: take the square root of the mean.
        n_bytes: a weight, while it is collected and where it is cached.
    """

    value: Value
    of_window: Callable[[Linear, Float[Tensor, "out in"]], Float[Tensor, "..."]]
    root: bool
    n_bytes: int


def effects(linear: Linear, gradient: Float[Tensor, "out in"]) -> Float[Tensor, " units_axis"]:
    """Sum of ``w g`` over each row, or over each column of output projections."""
    return (linear.weight.float() * gradient).sum(0 if linear.role in ("o", "down") else 1)


KINDS: dict[Kind, GradientKind] = {
    # Root mean square over the windows, unsigned. Its square is the diagonal of the empirical Fisher matrix, a sample a
    # window. Pruner-Zero (arXiv 2406.02924) and GBLM (arXiv 2311.04902) take the same sum of squares over calibration
    # samples; theirs is larger by a constant, the square root of the number of samples times 100, and is kept in fp16,
    # where small gradients vanish.
    "rms": GradientKind(cross_entropy, lambda linear, g: g.square(), True, 4),
    # Mean over the windows, signed.
    "mean": GradientKind(cross_entropy, lambda linear, g: g, False, 4),
    # Root mean square over the windows of the sum of w g over a row (a column of output projections).
    "sums": GradientKind(cross_entropy, lambda linear, g: effects(linear, g).square(), True, 0),
    # Mean of the gradients of the logits' peaks in place of the loss, signed.
    "logits": GradientKind(peak_logits, lambda linear, g: g, False, 4),
}


def empty_like(kind: Kind, linear: Linear) -> Float[Tensor, "..."]:
    """Zeros for the sums of a projection, in fp32, on its device."""
    return torch.zeros_like(
        KINDS[kind].of_window(linear, torch.zeros_like(linear.weight, dtype=torch.float32))
    )
