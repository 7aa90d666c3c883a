"""ADMM: the best weights for a given mask, by alternating directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruners.linalg import check_finite
from secateur.pruners.weights.method import LayerProblem
from secateur.pruners.weights.wanda import wanda_mask

N_STEPS = 20
RHO = 1.0
DEAD = 1e-8
"""Norm of inputs that are always zero: their weights are the first to be pruned."""


def admm(layer: LayerProblem, sparsities: Sequence[float]) -> Float[Tensor, "levels out in"]:
    """The weight at each sparsity: Wanda's mask, and the kept weights fitted to the dense outputs.

    Fast and Optimal Weight Update (Boza 2024, arXiv 2401.02938, algorithm 1). The paper's variant that chooses the
    mask between the steps is `admm_gradual`; and no mask is inverted, as it is in the released code of
    a method that builds on it (arXiv 2409.17372).

    Raises:
        ValueError: if the inputs are not finite.
    """
    fit = Fit.of(layer)
    return torch.stack([fit.masked(wanda_mask(layer, x)).to(layer.weight.dtype) for x in sparsities])


class Fit:
    """Least squares of the dense outputs under masks, given or chosen on the way; one factorisation serves all.

    With inputs scaled to the norm 1, ``H`` their second moment with `dampening` added, and ``rho = 1``, repeat
    ``Z = mask (W + U)``, ``U += W - Z``, ``W = (W0 H + rho (Z - U)) (H + rho)^-1``; the result is Z. The steps
    converge to the optimum of each row under its mask; 20 are the paper's.

    Args:
        weight: dense weight.
        second_moment: of its inputs, a token.
        dampening: added to the scaled second moment's diagonal, whose mean is 1. Dampening draws to the dense weights.
        name: the layer, for errors.

    Raises:
        ValueError: if the inputs are not finite.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        second_moment: Float[Tensor, "in in"],
        *,
        dampening: float,
        name: str = "the weight",
    ) -> None:
        check_finite(second_moment, name)
        norm = second_moment.diagonal().sqrt()
        self._scale = torch.where(norm > 0, norm, DEAD)
        moment = second_moment / self._scale / self._scale[:, None]
        moment.diagonal().add_(dampening)
        self._dense = weight.to(moment) * self._scale
        self._target = self._dense @ moment
        moment.diagonal().add_(RHO)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))

    @classmethod
    def of(cls, layer: LayerProblem) -> Fit:
        """Least squares of the outputs of a layer with a Gram matrix of its inputs."""
        gram = layer.inputs.gram
        assert gram is not None, "the caller collects what the registry says that is needed"
        moment = gram / max(layer.inputs.n_tokens, 1)
        return cls(layer.weight, moment, dampening=layer.dampening, name=layer.name)

    def masked(self, kept: Bool[Tensor, "_ in"], n_steps: int = N_STEPS) -> Float[Tensor, "out in"]:
        """The fitted weight, zero where the mask (True = keep) has it so; one row of a mask serves all rows."""
        return self.alternate(lambda step, scaled: kept, n_steps)

    def alternate(
        self, mask_at: Callable[[int, Float[Tensor, "out in"]], Bool[Tensor, "_ in"]], n_steps: int = N_STEPS
    ) -> Float[Tensor, "out in"]:
        """The fitted weight under a mask that each step may choose anew.

        Args:
            mask_at: from the step's index and ``W + U``, with inputs scaled to the norm 1, to the mask (True = keep).
            n_steps: >= 1.

        Returns:
            fp32 weights, zero where the last step's mask has it so.
        """
        w, u = self._dense, torch.zeros_like(self._dense)
        for step in range(n_steps):
            kept = mask_at(step, w + u)
            z = (w + u) * kept
            u = u + w - z
            w = (self._target + RHO * (z - u)) @ self._inverse
        return (w + u) * kept / self._scale
