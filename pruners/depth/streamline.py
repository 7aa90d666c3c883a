"""LLM-Streamline: one trained block in place of a window of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import stream_states
from secateur.pruners.depth.merge_targets import DroppedRun, Fitting, block_tensors, scores_from
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.runner import BlockRunner

N_TOKENS = 2048
"""Calibration tokens that windows are chosen by."""

WEIGHT_DECAY, CLIP = 1e-3, 5.0


def replacements(
    anatomy: Anatomy, runs: Sequence[DroppedRun], tokens: Int[Tensor, "windows length"], fitting: Fitting
) -> dict[int, dict[str, Tensor]]:
    """Parameters of each run's merge target, trained so that its output is that of the run's last block.

    LLM-Streamline (Chen et al. 2024, arXiv 2403.19135): ``min E ||f(x_l) - x_l+n||^2`` over one block f, which
    starts as the first block of the window, on hidden states of the dense model; AdamW, its rate falling along a
    cosine to a quarter. There it sees some 100,000 samples once; here it sees the calibration windows in a random
    order, again and again, for as many steps as are asked for, so it is a repair and no retraining. In fp32; the
    result has the dtype of the model.

    Raises:
        ValueError: if there is too little memory, or a loss is not finite.
    """
    if not runs:
        return {}
    size = _size(anatomy, (len(tokens), tokens.shape[1]), len(runs), fitting)
    what = f"the training of replacements of {len(runs)} runs of blocks"
    size.check(anatomy, what, "Use fewer or shorter windows, or another repair (`secateur list methods`).")
    wanted = {border for run in runs for border in (run.target, run.end)}
    states = {i: x for i, x in enumerate(stream_states(anatomy, tokens)) if i in wanted}
    return {run.target: _fit(anatomy, run, tokens, states, fitting) for run in runs}


@torch.enable_grad()
def _fit(
    anatomy: Anatomy,
    run: DroppedRun,
    tokens: Int[Tensor, "windows length"],
    states: Mapping[int, Float[Tensor, "windows length width"]],
    fitting: Fitting,
) -> dict[str, Tensor]:
    runner, block = BlockRunner(anatomy), anatomy.blocks[run.target]
    dense = block_tensors(block)
    trained = {name: x.detach().float().clone().requires_grad_(True) for name, x in dense.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=fitting.learning_rate, weight_decay=WEIGHT_DECAY)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, fitting.steps, fitting.learning_rate / 4)
    for rows in _batches(len(tokens), fitting):
        args, kwargs = _in_fp32(runner.start(tokens[rows]).calls[run.target])
        found = _run(block, trained, states[run.target][rows].float(), args, kwargs)
        loss = F.mse_loss(found, states[run.end][rows].float())
        if not torch.isfinite(loss):
            raise ValueError(
                f"Expected a finite loss of the replacement, got {loss.item()} at {block.name}. Lower "
                "`learning_rate`."
            )
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        falling.step()
    return {name: x.detach().to(dense[name].dtype) for name, x in trained.items()}


def _run(
    block: Block, tensors: Mapping[str, Tensor], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Float[Tensor, "windows length width"]:
    output = functional_call(block.module, dict(tensors), (hidden, *args), kwargs)
    below: Tensor = output[0] if isinstance(output, tuple) else output
    return below


def _batches(n_windows: int, fitting: Fitting) -> Iterator[list[int]]:
    """Windows of each step: all of them in a random order, then in another."""
    generator = torch.Generator().manual_seed(fitting.seed)
    queue: list[int] = []
    size = min(fitting.windows, n_windows)
    for _ in range(fitting.steps):
        if len(queue) < size:
            queue = torch.randperm(n_windows, generator=generator).tolist()
        yield [queue.pop() for _ in range(size)]


def _in_fp32(value: Any) -> Any:
    """Arguments of a block with their tensors of floats in fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _in_fp32(part) for name, part in value.items()}
    return tuple(_in_fp32(part) for part in value) if type(value) is tuple else value


def training_size(anatomy: Anatomy, windows: tuple[int, int]) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`; of one run of blocks, as most orders drop."""
    return _size(anatomy, windows, 1, Fitting())


def _size(anatomy: Anatomy, windows: tuple[int, int], n_runs: int, fitting: Fitting) -> TrainingSize:
    n_params = max(sum(x.numel() for x in block_tensors(block).values()) for block in anatomy.blocks)
    states = (
        2 * (n_runs + 1) * windows[0] * windows[1] * anatomy.width
    )  # at both borders of each run, at most
    return TrainingSize(
        fitting.steps,
        min(fitting.windows, windows[0]),
        windows[1],
        n_params * (3 + n_runs) + states,
        n_blocks=n_runs,
    )


@torch.no_grad()
def by_window(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Blocks in the order of windows whose output turns their input least.

    LLM-Streamline's choice (arXiv 2403.19135): of all windows of n + 1 blocks that with the highest mean cosine
    between input and output, whose first block becomes the replacement. There each n has its own window. To
    give one order for all budgets, the window is that of the paper where a quarter of the blocks is removed; smaller
    ones lie within it and larger ones around it, each the better of the two that are one block less, or more. Block 0
    is kept. On the first 2,048 calibration tokens.
    """
    few = tokens[: math.ceil(N_TOKENS / tokens.shape[1])]
    return scores_from(nested_order(_cosines(list(stream_states(anatomy, few)))), len(anatomy.blocks))


def _cosines(states: Sequence[Float[Tensor, "windows length width"]]) -> Float[Tensor, "borders borders"]:
    """Mean cosine over the tokens between the states at any two borders of blocks."""
    unit = torch.stack([F.normalize(x.flatten(0, 1).float(), dim=-1) for x in states])
    return torch.stack([(one * unit).sum(-1).double().mean(-1) for one in unit])


def nested_order(cosines: Float[Tensor, "borders borders"], *, replaced: bool = True) -> list[int]:
    """All blocks but the first, in the order of removal; see `by_window`.

    Args:
        cosines: likeness of the stream at any two borders; border b lies before block b.
        replaced: of windows with the block before them, which stands in for them; else of the dropped blocks alone.
    """
    n_blocks = len(cosines) - 1

    def similarity(window: range) -> float:
        return float(cosines[window.start - replaced, window.stop])

    size = min(max(1, n_blocks // 4), n_blocks - 1)
    start = max((range(first, first + size) for first in range(1, n_blocks - size + 1)), key=similarity)
    inner, window = [], start
    while len(window) > 1:
        smaller = max(window[1:], window[:-1], key=similarity)
        inner.append((set(window) - set(smaller)).pop())
        window = smaller
    order = [*window, *reversed(inner)]
    window = start
    while len(window) < n_blocks - 1:
        wider = (range(window.start - 1, window.stop), range(window.start, window.stop + 1))
        inside = (x for x in wider if x.start >= 1 and x.stop <= n_blocks)
        larger = max(inside, key=similarity)
        order.append((set(larger) - set(window)).pop())
        window = larger
    return order
