"""Norms of the inputs of projections as statistics of the whole dense model: over all tokens, and window by window."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.calibration.statistics import Hook
from secateur.pruners.calibration.stream import Walk, stream_blocks
from secateur.pruners.calibration.zeroth_order import forward_bytes
from secateur.pruners.models.anatomy import Anatomy, Linear


@torch.no_grad()
def input_norms(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> dict[str, Float[Tensor, " in"]]:
    """Root mean square over all tokens of each input channel, see `InputStatistics.norm`.

    Returns:
        For each projection by its full name, in fp32 on its device.
    """
    parts = stream_blocks(anatomy, tokens, inputs="moments")
    return {name: found.norm.clone() for part in parts for name, found in part.inputs.items()}


@torch.no_grad()
def window_norms(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> dict[str, Float[Tensor, " in"]]:
    """Mean over the windows of the root mean square over a window's tokens of each input channel.

    Of a routed expert each token is a window, as in `OutputStatistics`.

    Returns:
        For each projection by its full name, in fp32 on its device.
    """
    totals = {x.name: torch.zeros(x.in_features, device=x.weight.device) for x in anatomy.linears}
    counts = dict.fromkeys(totals, 0)

    def hook_of(linear: Linear) -> Hook:
        length = 1 if linear.expert is not None else tokens.shape[1]

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            windows = args[0].reshape(-1, length, args[0].shape[-1]).float()
            totals[linear.name] += windows.square().mean(1).sqrt().sum(0)
            counts[linear.name] += len(windows)

        return add

    walk = Walk(anatomy, tokens)
    for block in anatomy.blocks:
        walk.hidden = walk.through(block, [hook_of])
    return {name: total / max(counts[name], 1) for name, total in totals.items()}


def norm_bytes(anatomy: Anatomy, length: int) -> int:
    """About the memory of either beyond the model, in bytes, for windows of so many tokens."""
    return 4 * sum(linear.in_features for linear in anatomy.linears) + forward_bytes(anatomy, length)
