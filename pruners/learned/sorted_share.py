"""Differentiable share of a projection's weights, over ranks of importance."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

N_SHARES = 101
"""Candidates of the share: 0, 0.01, ..., 1."""

NEARLY = 1e-4
"""Slack of rounding down: 0.29 of 100 weights are 29, whatever the floats say."""


class SortedShare:
    """Share of the weights to remove, as a mixture of candidate shares over ranks within each row.

    BESA (Xu et al. 2024, arXiv 2402.16880): the share is ``sum_d beta_d p_d`` with beta a softmax; a weight of rank k
    among the n of its row is pruned with the chance ``sum_d beta_d [k < n p_d]``. The mask prunes the lowest
    ``floor(n share)`` of each row, and its gradient is that of the chances (straight-through).

    Args:
        scores: importance of each weight, higher = keep.
        smooth: the logits pass a sigmoid before the softmax, as in the released code.
    """

    def __init__(self, scores: Float[Tensor, "out in"], *, smooth: bool) -> None:
        width, device = scores.shape[1], scores.device
        self._ranks: Int[Tensor, "out in"] = scores.argsort(dim=1, stable=True).argsort(dim=1)
        self._smooth = smooth
        self._shares = torch.linspace(0, 1, N_SHARES, device=device)
        counts = (self._shares * width + NEARLY).long()
        below: Bool[Tensor, "shares in"] = torch.arange(width, device=device) < counts[:, None]
        self._below = below.float()
        self.logits = torch.zeros(N_SHARES, device=device, requires_grad=True)

    @property
    def share(self) -> Float[Tensor, ""]:
        """The share, with its gradient."""
        return self._betas @ self._shares

    def mask(self) -> Float[Tensor, "out in"]:
        """1 for kept weights, with the gradient of the chances of being kept."""
        chances = (1 - self._betas @ self._below)[self._ranks]
        return self.hard(float(self.share.detach())) - chances.detach() + chances

    def hard(self, share: float) -> Float[Tensor, "out in"]:
        """1 for the weights that this share keeps."""
        return (self._ranks >= int(self._ranks.shape[1] * share + NEARLY)).float()

    @property
    def _betas(self) -> Float[Tensor, " shares"]:
        return (self.logits.sigmoid() if self._smooth else self.logits).softmax(0)
