"""How much whole blocks matter: scores by which known methods drop the last ones; a registry of plain functions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.gradients import whole_model
from secateur.pruners.calibration.losses import mean_loss
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.depth.laco import by_acceptance
from secateur.pruners.depth.mka import by_similarity
from secateur.pruners.depth.streamline import by_window
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner

N_TOKENS = 2048
"""Calibration tokens that losses are measured on; Shortened LLaMA takes 1,280."""

Score = Callable[[Anatomy, Int[Tensor, "windows length"], ModelStatistics], tuple[float, ...]]


def position(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """The last blocks go first (Reassessing Layer Pruning, arXiv 2411.15558, reverse order)."""
    return tuple(float(-block.index) for block in anatomy.blocks)


@torch.no_grad()
def loss_without(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Cross-entropy, in nats per token, of the model without the block: Shortened LLaMA's PPL (arXiv 2402.02834).

    Perplexity, its exponential, orders alike. On the first calibration windows, 2,048 tokens; it takes half as many
    forward passes over them as the model has blocks.
    """
    runner = BlockRunner(anatomy)
    few = tokens[: math.ceil(N_TOKENS / tokens.shape[1])].to(runner.device)
    inputs = runner.start(few)
    losses, hidden = [], inputs.hidden
    for block in anatomy.blocks:
        above = hidden
        for later in anatomy.blocks[block.index + 1 :]:
            above = runner.block(later.index, above, inputs)
        losses.append(mean_loss(anatomy, above, few))
        hidden = runner.block(block.index, hidden, inputs)
    return tuple(losses)


ENDS = (4, 2)
"""Blocks at the beginning and at the end that Taylor+ never removes."""


def taylor_plus(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Sum of ``|w g|`` over the block's projections, g of the mean loss: Shortened LLaMA's Taylor+.

    The first four and the last two blocks go last of all: the "+" (arXiv 2402.02834). Norms, which the paper
    counts too, are left out: of thousands of weights to each of theirs.
    """
    scores = []
    for block in anatomy.blocks:
        effects = (
            (linear.weight.float() * whole.gradients["mean"][linear.name].to(linear.weight.device))
            .abs()
            .sum()
            for linear in block.linears
        )
        inside = ENDS[0] <= block.index < len(anatomy.blocks) - ENDS[1]
        scores.append(float(sum(effects)) if inside else math.inf)
    return tuple(scores)


@dataclass(frozen=True)
class DepthRow:
    """A row of the registry.

    Args:
        function: a score for each block, higher = keep.
        data: it needs calibration data.
        gradients: kinds of them that must be collected first.
        summary: one line for people.
        paper: address.
    """

    function: Score
    data: bool
    gradients: tuple[Kind, ...]
    summary: str
    paper: str


DEPTH: dict[str, DepthRow] = {
    "last": DepthRow(position, False, (), "the last blocks go first", "https://arxiv.org/abs/2411.15558"),
    "shortened_ppl": DepthRow(
        loss_without,
        True,
        (),
        "blocks go first without which the loss is lowest",
        "https://arxiv.org/abs/2402.02834",
    ),
    "shortened_taylor": DepthRow(
        taylor_plus,
        True,
        ("mean",),
        "blocks of least first-order effect go first, the ends last",
        "https://arxiv.org/abs/2402.02834",
    ),
    "laco": DepthRow(
        by_acceptance,
        True,
        (),
        "blocks go first whose merge into the block before keeps the last hidden states",
        "https://arxiv.org/abs/2402.11187",
    ),
    "mka": DepthRow(
        by_similarity,
        True,
        (),
        "blocks go first whose outputs lie as those of the block before",
        "https://arxiv.org/abs/2406.16330",
    ),
    "streamline": DepthRow(
        by_window,
        True,
        (),
        "blocks go first in the window that turns its input least",
        "https://arxiv.org/abs/2403.19135",
    ),
}


def depth_scores(
    names: Collection[str],
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    directory: Path,
    identity: str,
) -> dict[str, tuple[float, ...]]:
    """Scores of the dense model's blocks by name; kept beside a store, for the next time.

    Args:
        names: rows of the registry.
        anatomy: the dense model.
        tokens: calibration windows.
        directory: of the store.
        identity: of the model and the tokens, in one text.

    Raises:
        LevelStoreError: if there is no room on the disk for gradients.
        ValueError: as `gradients.collect_gradients` does.
    """
    path = directory.with_name(f"{directory.name}-depth.json")
    known = _read(path, identity)
    for name in names:
        if name not in known:
            row = DEPTH[name]
            whole = whole_model(directory, anatomy, tokens, identity, gradients=row.gradients)
            known[name] = row.function(anatomy, tokens, whole)
            path.write_text(json.dumps({"identity": identity, "scores": known}), encoding="utf-8")
    return {name: known[name] for name in names}


def _read(path: Path, identity: str) -> dict[str, tuple[float, ...]]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if kept.get("identity") != identity:
        return {}
    return {name: tuple(scores) for name, scores in kept["scores"].items()}
