"""Pruned weights stay pruned while the others learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Anatomy


class Zeros:
    """The zeros of those projections whose weights learn themselves.

    Their gradients are dropped, so that they count neither in the gradient's norm nor in the optimizer's moments,
    and `restore` puts them back after a step, whatever the optimizer did. (For ``lora`` see `MaskedLora`.)

    Args:
        anatomy: the pruned model, its weights in place and `requires_grad` set.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []
        for linear in anatomy.linears:
            weight = linear.module.weight
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                self._zeros.append((weight, weight.data == 0))

    def drop_gradients(self) -> None:
        """Set the gradients of zeros to 0."""
        for weight, zero in self._zeros:
            if weight.grad is not None:
                weight.grad.masked_fill_(zero, 0)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights that were zeros to 0."""
        for weight, zero in self._zeros:
            weight.masked_fill_(zero, 0)
