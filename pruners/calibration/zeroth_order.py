"""Gradients of the dense model's loss from forward passes alone, in the memory of inference."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.stream import BATCH_TOKENS, mean_loss
from secateur.pruners.models.anatomy import Anatomy, Block, Linear
from secateur.pruners.models.runner import BlockRunner, fp32_bytes, in_fp32

N_DRAWS = 32
EPSILON = 1e-3
Noise = Callable[[Linear], Float[Tensor, "out in"]]


@torch.no_grad()
def estimate_gradients(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    *,
    n_draws: int = N_DRAWS,
    epsilon: float = EPSILON,
    seed: int = 0,
) -> dict[str, Float[Tensor, "out in"]]:
    """An estimate of the gradient of the mean cross-entropy, in nats per token; without bias up to epsilon^2.

    Simultaneous perturbation (Spall 1992) as MINI-LLM uses it (arXiv 2407.11681): the mean over draws of
    ``(L(W + eps z) - L(W - eps z)) / (2 eps) z`` with z normal, in all projections at once. Use it where a backward
    pass has no room; it is far noisier: of one draw the squared error is about the number of weights times the
    squared gradient.

    [INFER] MINI-LLM is known by its abstract; epsilon and the number of draws are not the authors'. The windows are
    dealt out to the draws, so that all draws together take two forward passes over the calibration tokens, or over
    as many windows as there are draws, if that is more. z is never kept: it is made twice from the seed, the
    draw and the projection's name, by the generator of the weight's device. Computed in fp32 whatever the model's
    dtype.

    Args:
        anatomy: the dense model; not changed.
        tokens: calibration windows of at least two tokens.
        n_draws: how many z, > 0.
        epsilon: how far weights are moved, > 0.

    Returns:
        For each projection by its full name, in fp32 on its device.

    Raises:
        ValueError: if a loss is not finite.
    """
    totals = {linear.name: torch.zeros_like(linear.weight, dtype=torch.float32) for linear in anatomy.linears}
    n_windows = 0
    with in_fp32(anatomy.model):
        for draw in range(n_draws):
            windows = tokens[draw % len(tokens) :: n_draws]
            slope = _slope(anatomy, windows, epsilon, _noise(seed, draw))
            for linear in anatomy.linears:
                totals[linear.name].add_(_noise(seed, draw)(linear), alpha=slope * len(windows))
            n_windows += len(windows)
    return {name: total.div_(n_windows) for name, total in totals.items()}


def estimate_bytes(anatomy: Anatomy, length: int) -> int:
    """About the memory of `estimate_gradients` beyond the model, in bytes: the estimates, and a forward pass."""
    kept = 4 * sum(linear.n_weights for linear in anatomy.linears)
    moved = 8 * max(sum(linear.n_weights for linear in block.linears) for block in anatomy.blocks)
    return kept + moved + fp32_bytes(anatomy.model) + forward_bytes(anatomy, length)


def forward_bytes(anatomy: Anatomy, length: int) -> int:
    """About the memory of forward passes through single blocks, and of the logits of a window, in bytes."""
    widest = max(linear.out_features for linear in anatomy.linears)
    heads = max(block.n_heads for block in anatomy.blocks)
    batch = max(BATCH_TOKENS, length)
    return 4 * (batch * (4 * anatomy.width + 3 * widest + heads * length) + 2 * length * anatomy.vocab_size)


def _noise(seed: int, draw: int) -> Noise:
    """Function from a projection to its z, the same at each call."""

    def make(linear: Linear) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{draw}/{linear.name}".encode()).digest()
        device = linear.weight.device
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(linear.weight.shape, generator=generator, device=device)

    return make


def _slope(anatomy: Anatomy, windows: Int[Tensor, "windows length"], epsilon: float, noise: Noise) -> float:
    """Slope of the loss along the noise; both sides run block by block, so that only one block is ever moved."""
    runner = BlockRunner(anatomy)
    windows = windows.to(runner.device)
    parts = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
    batches = [runner.start(part) for part in parts]
    sides = {side: [batch.hidden for batch in batches] for side in (epsilon, -epsilon)}
    for block in anatomy.blocks:
        directions = {linear.name: noise(linear) for linear in block.linears}
        for side, hidden in sides.items():
            with _moved(block, directions, side):
                sides[side] = [
                    runner.block(block.index, x, batch) for x, batch in zip(hidden, batches, strict=True)
                ]
    above, below = (
        sum(mean_loss(anatomy, x, ids) * len(ids) for x, ids in zip(hidden, parts, strict=True))
        / len(windows)
        for hidden in sides.values()
    )
    slope = (above - below) / (2 * epsilon)
    if not abs(slope) < torch.inf:
        raise ValueError(f"Expected finite losses, got {above} and {below}. Check the calibration text.")
    return slope


@contextmanager
def _moved(block: Block, directions: dict[str, Tensor], distance: float) -> Iterator[None]:
    """Context in which the block's weights are moved so far along a direction."""
    dense = [(linear, linear.weight) for linear in block.linears]
    try:
        for linear, weight in dense:
            linear.point_to(weight.add(directions[linear.name], alpha=distance))
        yield
    finally:
        for linear, weight in dense:
            linear.point_to(weight)
