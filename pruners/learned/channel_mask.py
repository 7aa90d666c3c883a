"""Mask of the hidden channels that sharpens step by step, of PAT (Liu et al. 2025, arXiv 2408.14721)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

FROZEN = 0.8
"""Share of the sharpening steps behind which the loss no longer moves the mask."""

LARGEST_EXPONENT = 10.0
COUNT_WEIGHT, ENDS = 10.0, 0.5
"""Weight of the relative distance from the number of channels, and where the mask's values are drawn to, up or down."""


class ChannelMask:
    """Mask of the hidden channels, whose values are at first 0, and which sharpens step by step.

    Args:
        n_channels: of the stream.
        width: number of those that are to stay.
        n_steps: in which it sharpens.
        device: of the tensors.
    """

    def __init__(self, n_channels: int, width: int, n_steps: int, device: torch.device) -> None:
        self._width, self._n_steps = width, n_steps
        self.values = torch.zeros(n_channels, device=device, requires_grad=True)

    def gates(self, step: int) -> Float[Tensor, " channels"]:
        """Gates of a step: ``sigmoid(T m) + max(1/2 - t/n, 0)`` with ``T = 1 / (1 - ln t / ln n)``; at first 1."""
        frozen = int(FROZEN * self._n_steps)
        values = self.values if step < frozen else self.values.detach()
        temperature = 1 / (1 - math.log(max(1, min(step, frozen))) / math.log(self._n_steps) + 1e-6)
        exponents = (-temperature * values).clamp(max=LARGEST_EXPONENT)
        return 1 / (1 + exponents.exp()) + max(0.5 - step / self._n_steps, 0.0)

    @property
    def penalty(self) -> Float[Tensor, ""]:
        """Distance of the number of values >= 0 from the width, straight through, and of values from their ends."""
        values = self.values
        chosen = (values >= 0).float() + values - values.detach()
        missing = (chosen.sum() - self._width).abs() / self._width
        sides = (values[values > 0] - ENDS, values[values <= 0] + ENDS)
        return COUNT_WEIGHT * missing + torch.stack([x.square().mean() for x in sides if len(x)]).sum()

    @property
    def kept(self) -> tuple[int, ...]:
        """Channels of the highest values, ascending."""
        order = self.values.detach().argsort(descending=True, stable=True)
        return tuple(sorted(order[: self._width].tolist()))
