"""What is known about the inputs of a projection, and of the whole model, over the calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind


@dataclass
class InputStatistics:
    """Running moments of a projection's inputs, accumulated in fp32.

    Args:
        n_tokens: calibration tokens seen.
        sum_squares: sum over tokens of the squared input, per feature.
        gram: sum over tokens of the outer product of the input with itself, or None if not collected.
        total: sum over tokens of the input, or None if not collected.
    """

    n_tokens: int
    sum_squares: Float[Tensor, " in"]
    gram: Float[Tensor, "in in"] | None
    total: Float[Tensor, " in"] | None = None

    @classmethod
    def empty(cls, n_features: int, *, gram: bool, device: torch.device) -> InputStatistics:
        """Nothing seen yet."""
        matrix = torch.zeros(n_features, n_features, device=device) if gram else None
        squares, total = torch.zeros(2, n_features, device=device)
        return cls(0, squares, matrix, total)

    def add(self, inputs: Float[Tensor, "... in"]) -> None:
        """Add a batch of inputs."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.n_tokens += rows.shape[0]
        if self.total is not None:
            self.total += rows.sum(0)
        if self.gram is None:
            self.sum_squares += rows.square().sum(0)
        else:
            self.gram.addmm_(rows.T, rows)
            self.sum_squares = self.gram.diagonal()

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """Root mean square of each input feature: its l2 norm over the tokens, divided by sqrt(n_tokens)."""
        return (self.sum_squares / max(self.n_tokens, 1)).sqrt()


@dataclass(frozen=True)
class ModelStatistics:
    """What is known about the dense model as a whole.

    Args:
        n_blocks: length of the stack.
        gradients: those that were collected, by kind (see `gradient_kinds.KINDS`, `forward_kinds.FORWARD_KINDS`)
            and the projection's full name.
    """

    n_blocks: int
    gradients: Mapping[Kind, Mapping[str, Float[Tensor, "..."]]]
