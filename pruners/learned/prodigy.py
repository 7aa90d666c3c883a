"""Prodigy: Adam whose step size follows from the distance that the parameters have gone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

D0 = 1e-6
"""First estimate of the distance."""


class Prodigy(torch.optim.Optimizer):
    """Adam with the step size estimated from gradients (Mishchenko and Defazio 2023, arXiv 2306.06101, algorithm 4).

    Without warm-up, bias correction and weight decay, the defaults of its released code.

    Args:
        params: trained tensors, which share one estimate.
        d_coef: factor of the estimate.
        betas: decay of the means of gradients and of their squares.
        eps: added to the root of the mean square, times the estimate.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        d_coef: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": 1.0, "d_coef": d_coef, "betas": betas, "eps": eps, "d": D0, "numerator": 0.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # the base class allows a loss
        """One step; parameters without a gradient stay."""
        (group,) = self.param_groups
        (beta1, beta2), d = group["betas"], group["d"]
        beta3, rate = math.sqrt(beta2), d * group["lr"]
        group["numerator"] *= beta3
        moved = [(p, self._state_of(p)) for p in group["params"] if p.grad is not None]
        denominator = 0.0
        for p, state in moved:
            weight = d / D0 * rate
            group["numerator"] += weight * float((p.grad * (state["start"] - p)).sum())
            state["mean"].mul_(beta1).add_(p.grad, alpha=d * (1 - beta1))
            state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=d * d * (1 - beta2))
            state["sum"].mul_(beta3).add_(p.grad, alpha=weight)
            denominator += float(state["sum"].abs().sum())
        if not denominator:
            return
        group["d"] = max(d, group["d_coef"] * group["numerator"] / denominator)
        for p, state in moved:
            p.addcdiv_(state["mean"], state["square"].sqrt().add_(group["d"] * group["eps"]), value=-rate)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state |= {name: torch.zeros_like(p) for name in ("mean", "square", "sum")}
            state["start"] = p.detach().clone()
        found: dict[str, Tensor] = state
        return found
