"""Hard concrete gates of one kind of units, their target number and the Lagrangian that holds it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.learned.hard_concrete import (
    BOUNDS,
    augmented_lagrangian,
    expected_kept,
    final_gates,
    present_gates,
    sampled_gates,
)
from secateur.pruners.learned.training import named_generator

START, DEVIATION = 5.0, 0.01
"""Mean and deviation of the first locations."""


class Gates:
    """Gates of units, of which some are to stay.

    Args:
        name: of what has the units; the first locations depend on it.
        n_units: number of gates.
        n_kept: number of units that are to stay.
        seed: of the first locations.
        device: of the tensors.
    """

    def __init__(self, name: str, n_units: int, n_kept: int, seed: int, device: torch.device) -> None:
        noise = DEVIATION * torch.randn(n_units, generator=named_generator(seed, name))
        self.name, self.n_units, self.n_kept = name, n_units, n_kept
        self.log_alpha = (START + noise).to(device).requires_grad_()
        self.multipliers = torch.zeros(2, device=device, requires_grad=True)

    def sampled(self, generator: torch.Generator) -> Float[Tensor, " units"]:
        """Gates of a step, with their gradients."""
        return sampled_gates(self.log_alpha, generator)

    @property
    def present(self) -> Float[Tensor, " units"]:
        """Gates of the model as it is now, to measure it."""
        return present_gates(self.log_alpha.detach())

    def penalty(self, rise: float) -> Float[Tensor, ""]:
        """The Lagrangian term when so much of the target is asked for."""
        return lagrangian(self.log_alpha, rise * (1 - self.n_kept / self.n_units), self.multipliers)

    def settle(self) -> None:
        """Keep the locations within their bounds."""
        self.log_alpha.clamp_(*BOUNDS)

    @property
    def kept(self) -> tuple[int, ...]:
        """The units with the highest locations, ascending."""
        order = self.log_alpha.detach().argsort(descending=True, stable=True)
        return tuple(sorted(order[: self.n_kept].tolist()))

    @property
    def final(self) -> Float[Tensor, " units"]:
        """Values of the gates at the end, for those that stay."""
        return final_gates(self.log_alpha.detach())


def lagrangian(
    log_alpha: Float[Tensor, " units"], target: float, multipliers: Float[Tensor, "2"]
) -> Float[Tensor, ""]:
    """``lambda_1 (s - t) + lambda_2 (s - t)^2`` with s the expected sparsity of the gates."""
    return augmented_lagrangian(1 - expected_kept(log_alpha).mean() - target, multipliers)
