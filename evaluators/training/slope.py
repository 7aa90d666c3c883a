"""SLoPe: sparse weights with a doubly pruned backward pass, and low-rank adapters in the last steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Linear

LAZY = 0.01
"""Share of the steps, the last ones, in which the adapters learn."""

GROUP = 4
"""Neighbouring outputs among which the backward pass keeps the largest weights of an input."""


class _DoublyPruned(torch.autograd.Function):
    """A linear layer whose inputs' gradients come from another weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, backward: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, backward)
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        inputs, backward = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return gradient @ backward, rows.T @ inputs.flatten(0, -2), None, of_bias


class LazyAdapter:
    """A projection's forward pass in SLoPe's training.

    Mozaffari et al. 2024, arXiv 2405.16325: the sparse weight is trained all along; the gradient of the inputs comes
    from the weight pruned once more, along its outputs, so that both passes have a pattern; in the last hundredth of
    the steps an update ``L R / rank`` is trained, too. L is normal and R zero at first.

    Differences: the update is 0 where the weight is, and is merged, where the paper keeps it beside the sparse weight:
    the model has its zeros and its class. [INFER] The second pruning keeps the largest weights of each input in every
    four outputs, as many as the density asks for, and is made once.

    Args:
        linear: the pruned projection.
        rank: of the update.
        seed: of its first values.
    """

    def __init__(self, linear: Linear, rank: int, seed: int) -> None:
        digest = hashlib.sha256(f"{seed}/{linear.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        device = linear.weight.device
        self._linear, self._rank, self.awake = linear, rank, False
        self.kept = kept_backward(linear.weight)
        left = torch.randn(linear.out_features, rank, generator=generator).to(device)
        linear.module.register_parameter("lazy_left", nn.Parameter(left))
        linear.module.register_parameter(
            "lazy_right", nn.Parameter(torch.zeros(rank, linear.in_features, device=device))
        )
        linear.module.forward = self._forward  # of the instance, as BlockRunner does

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight with the update, with gradients."""
        module: Any = self._linear.module
        weight: Tensor = module.weight.T if self._linear.transposed else module.weight
        if not self.awake:
            return weight
        update: Tensor = module.lazy_left @ module.lazy_right / self._rank
        return weight + update.masked_fill(weight == 0, 0)

    def _forward(self, inputs: Tensor) -> Tensor:
        module: Any = self._linear.module
        weight = self.weight
        found: Tensor = _DoublyPruned.apply(inputs, weight, weight.detach() * self.kept, module.bias)
        return found

    def merge(self) -> None:
        """Write the changed weight into the projection, which is again as it was made."""
        module: Any = self._linear.module
        self.awake = True
        with torch.no_grad():
            changed = self.weight.clone()
            module.weight.copy_(changed.T if self._linear.transposed else changed)
        del module.lazy_left, module.lazy_right, module.forward


def kept_backward(weight: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
    """True of the weights that the backward pass has: of each input the largest in every `GROUP` of outputs.

    As many of a group as the weight's density asks for, at least one; all where the groups do not fit the outputs.
    """
    n_out, n_in = weight.shape
    n_kept = max(1, round(GROUP * float((weight != 0).float().mean())))
    if n_out % GROUP or n_kept == GROUP:
        return torch.ones_like(weight, dtype=torch.bool)
    groups = weight.abs().reshape(-1, GROUP, n_in)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(1, groups.topk(n_kept, dim=1).indices, True)
    return kept.reshape(n_out, n_in)


def attach_lazily(
    linears: Iterable[Linear], rank: int, seed: int
) -> tuple[Callable[[], None], Callable[[int, int], None]]:
    """Train projections as SLoPe does: functions that merge, and that are called before each step."""
    adapters = [LazyAdapter(linear, rank, seed) for linear in linears]

    def merge() -> None:
        for adapter in adapters:
            adapter.merge()

    def before_step(step: int, n_steps: int) -> None:
        for adapter in adapters:
            adapter.awake = step >= n_steps - math.ceil(LAZY * n_steps)

    return merge, before_step
