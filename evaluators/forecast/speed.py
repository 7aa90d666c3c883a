"""Speed of this machine with a model of this shape: its first block, with random weights, timed for about a second."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from secateur.evaluators.data.windows import EvaluationData, batch_tokens
from secateur.evaluators.forecast.prospect import Outline, dense_of
from secateur.evaluators.losses import loss_sums
from secateur.evaluators.plan import SessionPlan
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.calibration.tokens import Calibration
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.memory import available_bytes
from secateur.pruners.models.runner import BlockInputs, BlockRunner
from secateur.pruners.models.shape import prunables
from secateur.pruners.models.skeleton import MOST_TOKEN_IDS, miniature
from secateur.pruners.pruner import Pruner, pruner_class
from secateur.spaces.measurement import Fidelity
from secateur.spaces.registry import SPACES

SECONDS = 0.3
"""Least time of each measurement, and the most that is spent on tokens before more of them are tried."""

MOST_WEIGHTS = 100_000_000
"""Levels of a block are not timed beyond so many values to make."""


@dataclass(frozen=True)
class Speed:
    """Seconds of the work on one block, or on the model's ends.

    Args:
        block: a token through the block.
        loss: a token from the last block to its losses.
        teacher: a token of the dense side of the loss, beyond the blocks.
        watched: a token through the block while statistics are collected; None: not timed.
        levels: all levels of the block, made and written; None: not timed.
        switch: of the block to a candidate's weights and back; None: not timed.
        read: a byte of the weights, on the way into memory.
        device: that it was measured on.
        both_ways: a token forward and backward through the block, with gradients of its weights; None: not timed.
    """

    block: float
    loss: float
    teacher: float
    watched: float | None
    levels: float | None
    switch: float | None
    read: float
    device: str
    both_ways: float | None = None

    def training(self, stack: float, *, head: bool = True, teacher: bool = False) -> float:
        """Seconds of a trained token, or of one whose gradients are collected; its logits backward are twice forward.

        Args:
            stack: multiply-accumulates of the blocks, as a multiple of the first one's.
            head: with the loss.
            teacher: with a forward pass of another model.
        """
        inside = 3 * self.block if self.both_ways is None else self.both_ways
        seconds = stack * inside + (3 * self.loss if head else 0.0)
        return seconds + (stack * self.block + self.loss if teacher else 0.0)


def timed(call: Callable[[], object], device: torch.device, least: float = SECONDS) -> float:
    """Seconds of a call: the fastest of several within the least time, the first not counted."""
    call()
    times: list[float] = []
    while sum(times) < least and len(times) < 50:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


@torch.no_grad()
def measure_speed(
    found: Outline, window: int, plan: SessionPlan | None = None, *, trains: bool = False
) -> Speed | None:
    """Speed with a model of this shape; None if there is no room, or the model can't be cut down to a block.

    The losses are timed on part of a large vocabulary, and counted in proportion to the whole.

    Args:
        found: the outline; its device must be there.
        window: tokens of a window.
        plan: of a search on it, whose statistics and levels are timed, too; None: of none.
        trains: time the block backward, too.
    """
    try:
        return _measured(found, window, plan, trains=trains)
    finally:
        gc.collect()  # modules refer to each other: the timed model would stay for a while


def _measured(found: Outline, window: int, plan: SessionPlan | None, *, trains: bool) -> Speed | None:
    try:
        anatomy = _first_block(found)
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        RuntimeError,
    ):  # whatever a family makes of one block
        return None
    if anatomy is None:
        return None
    tokens = _tokens(anatomy, window)
    runner = BlockRunner(anatomy)
    inputs = runner.start(tokens)
    block = timed(lambda: runner.block(0, inputs.hidden, inputs), found.device) / tokens.numel()
    both_ways = _both_ways(anatomy, runner, inputs, found.device) / tokens.numel() if trains else None
    part = tokens[:1]
    per_token, inputs = part.numel(), runner.start(part)
    fidelity = Fidelity("search", per_token)

    def prepared() -> Any:
        return EvaluationData(anatomy, {"search": part}, [fidelity]).of(fidelity)

    whole = timed(prepared, found.device) / per_token
    [batch, *_] = prepared()
    loss = timed(lambda: loss_sums(anatomy, inputs.hidden, batch.tokens, batch.teacher), found.device)
    pruner = None if plan is None else _pruner(replace(found, anatomy=anatomy), plan, tokens)
    watched, levels, switch = (None, None, None) if pruner is None else _of_pruner(pruner, found, tokens)
    weight = anatomy.head.weight[:8192]
    read = timed(lambda: torch.isfinite(weight.float()).all(), found.device, 0.05) / weight.nbytes
    larger = found.anatomy.vocab_size / anatomy.vocab_size
    teacher = max(0.0, whole - block) * larger
    loss *= larger / per_token
    return Speed(block, loss, teacher, watched, levels, switch, read, str(found.device), both_ways)


def _both_ways(anatomy: Anatomy, runner: BlockRunner, inputs: BlockInputs, device: torch.device) -> float:
    """Seconds of the block forward and backward."""
    weights = [linear.module.weight for linear in anatomy.linears if linear.expert is None]
    trained = [x.requires_grad_() for x in weights if isinstance(x, torch.nn.Parameter)]
    hidden = inputs.hidden.clone().requires_grad_()

    def call() -> None:
        with torch.enable_grad():
            total = runner.graph(0, hidden, inputs).sum()
            torch.autograd.grad(total, [hidden, *trained], allow_unused=True)

    try:
        return timed(call, device)
    finally:
        for x in trained:
            x.requires_grad_(False)


def _first_block(found: Outline) -> Anatomy | None:
    """A live model of the first block; None if it would take more than half of the free memory."""
    anatomy = found.anatomy
    outside = {id(x) for x in anatomy.model.parameters()} - {id(x) for x in anatomy.container.parameters()}
    inside = sum(x.numel() for x in anatomy.blocks[0].module.parameters())
    of_vocabulary = min(
        1, MOST_TOKEN_IDS / anatomy.vocab_size
    )  # embedding and head, nearly all that is outside
    n_values = inside + of_vocabulary * sum(x.numel() for x in anatomy.model.parameters() if id(x) in outside)
    left = available_bytes(found.device)
    if left is not None and n_values * found.dtype.itemsize * 2 > left:
        return None
    live = miniature(found.config, found.dtype, found.device, trust_remote_code=found.trust_remote_code)
    return replace(dissect(live, anatomy.bos), all_experts=anatomy.all_experts)


def _tokens(anatomy: Anatomy, window: int) -> Tensor:
    """As many made-up tokens as go through a block in a moment: part of a window, a window, or a whole batch."""
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        anatomy.vocab_size, (max(1, batch_tokens(anatomy) // window), window), generator=drawn
    )
    for part in (tokens[:1, :128], tokens[:1]):
        runner = BlockRunner(anatomy)
        inputs = runner.start(part)
        runner.block(0, inputs.hidden, inputs)
        started = time.perf_counter()
        runner.block(0, inputs.hidden, inputs)
        if time.perf_counter() - started > SECONDS / 4:
            return part
    return tokens


def _pruner(found: Outline, plan: SessionPlan, tokens: Tensor) -> Pruner | None:
    """The pruner of the plan on one block; None if its space has no candidates of one block."""
    settings = plan.space
    try:
        dense = dense_of(found, tokens.shape[1], settings)
        space = SPACES[settings.kind].build(settings, prunables(found.anatomy), dense.shape)
    except ValueError:
        return None
    calibration = Calibration(tokens, "made up", {}, found.anatomy.all_experts, tokens)
    return pruner_class(settings)(settings, dense, space=space, seed=plan.seed, calibration=calibration)


def _of_pruner(
    pruner: Pruner, found: Outline, tokens: Tensor
) -> tuple[float | None, float | None, float | None]:
    """Seconds of statistics a token, of a block's levels, and of a switch of the block."""
    anatomy, streamed = pruner.anatomy, pruner.streamed
    watched = None
    if streamed:
        once = timed(lambda: list(stream_blocks(anatomy, tokens, **streamed)), found.device)
        watched = once / tokens.numel()
    n_weights = sum(linear.n_weights for linear in anatomy.linears)
    if pruner.stored_bytes() > MOST_WEIGHTS * 4 or n_weights > MOST_WEIGHTS:
        return watched, None, None
    with TemporaryDirectory(prefix="secateur-") as name:
        directory = Path(name) / "levels"
        started = time.perf_counter()
        pruner.prepare(directory)
        levels = time.perf_counter() - started - (once if streamed else 0.0)
        switch = _switch(pruner, directory, found.device)
    return watched, max(0.0, levels), switch


def _switch(pruner: Pruner, directory: Path, device: torch.device) -> float | None:
    """Seconds to point the block to a candidate's weights, and back."""
    others = [x for name, x in pruner.space.baselines().items() if name != "dense"]
    if not others or not pruner.keys_of_configs:
        return None
    pruner.open(directory)
    [key, *_] = pruner.keys(pruner.space.config(others[0]))

    def switch() -> None:
        pruner.apply(0, key)
        pruner.release(0)

    try:
        return timed(switch, device, 0.1)
    finally:
        pruner.restore()


def process_seconds(model: object) -> float:
    """Seconds until a fresh process has what the check of an export imports, the class of the model among it."""
    started = time.perf_counter()
    named = f"AutoModelForCausalLM, AutoTokenizer, DynamicCache, {type(model).__name__}"
    imports = f"import torch; from transformers import {named}"  # which imports it when it is named
    subprocess.run([sys.executable, "-c", imports], check=False, capture_output=True)
    return time.perf_counter() - started


def block_shares(anatomy: Anatomy, window: int) -> list[float]:
    """Multiply-accumulates of each block as shares of the first one's."""
    macs = [_macs(block, window) for block in anatomy.blocks]
    return [x / macs[0] for x in macs]


def _macs(block: Any, window: int) -> float:
    inside = sum(linear.n_weights for linear in block.linears if linear.expert is None)
    mixture = block.mixture
    if mixture is not None:
        inside += mixture.top_k * sum(p.numel() for p in mixture.experts[0].parameters() if p.ndim > 1)
    return float(inside + sum(mixer.score_macs * block.attended(window) for mixer in block.mixers)) or 1.0
