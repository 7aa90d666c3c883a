"""Runs of dropped blocks, with the kept block before each as merge target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy, Block


@dataclass(frozen=True)
class DroppedRun:
    """Consecutive dropped blocks.

    Args:
        target: the block right before them, kept.
        dropped: their indices, ascending.
    """

    target: int
    dropped: tuple[int, ...]

    @property
    def end(self) -> int:
        """Index of the block right behind them."""
        return self.dropped[-1] + 1


def runs_of(dropped: Sequence[int], n_blocks: int) -> tuple[DroppedRun, ...]:
    """Runs of consecutive dropped blocks, in order.

    Raises:
        ValueError: if block 0 or one that does not exist is dropped, or one is dropped twice.
    """
    if len(set(dropped)) < len(dropped) or not all(0 < index < n_blocks for index in dropped):
        raise ValueError(
            f"Expected `dropped` to be different blocks from 1 to {n_blocks - 1}, got {list(dropped)}. "
            "Block 0 is always kept."
        )
    runs: list[DroppedRun] = []
    for index in sorted(dropped):
        if runs and runs[-1].end == index:
            runs[-1] = DroppedRun(runs[-1].target, (*runs[-1].dropped, index))
        else:
            runs.append(DroppedRun(index - 1, (index,)))
    return tuple(runs)


def blocks_beside_dropped(anatomy: Anatomy, *, merged: bool) -> tuple[int, ...]:
    """Kept blocks of a pruned model next to dropped ones, ascending.

    Args:
        anatomy: the live model, whose dropped blocks have no weights.
        merged: True if dropped blocks were merged into the one before them, which alone counts; else both
            neighbours do.
    """
    kept = [block.index for block in anatomy.blocks if any(linear.n_weights for linear in block.linears)]
    found = set()
    for before, after in pairwise([-1, *kept, len(anatomy.blocks)]):
        if after - before > 1:
            found |= {before} if merged else {before, after}
    return tuple(sorted(found.intersection(kept)))


def scores_from(order: Sequence[int], n_blocks: int) -> tuple[float, ...]:
    """Score of each block, higher = keep: its place in the order of removal, infinite for kept blocks."""
    scores = [math.inf] * n_blocks
    for place, index in enumerate(order):
        scores[index] = float(place)
    return tuple(scores)


def block_tensors(block: Block) -> dict[str, Tensor]:
    """Parameters of the live block by their names in it: projections, biases and norms."""
    return {name: parameter.data for name, parameter in block.module.named_parameters()}


def point_block(block: Block, tensors: Mapping[str, Tensor]) -> None:
    """Point each parameter of the live block to the tensor of its name, by reference."""
    for name, parameter in block.module.named_parameters():
        parameter.data = tensors[name]


@contextmanager
def pointed(block: Block, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which the live block uses these tensors."""
    before = block_tensors(block)
    point_block(block, tensors)
    try:
        yield
    finally:
        point_block(block, before)


def merged_tensors(anatomy: Anatomy, run: DroppedRun) -> list[dict[str, Tensor]]:
    """Parameters of the merge target, and of each block that is merged into it.

    Raises:
        ValueError: if they differ in shape, so that they can't be merged.
    """
    blocks = [anatomy.blocks[index] for index in (run.target, *run.dropped)]
    shapes = [{name: x.shape for name, x in block_tensors(block).items()} for block in blocks]
    for block, other in zip(blocks, shapes, strict=True):
        if other != shapes[0]:
            raise ValueError(
                f"Expected blocks of the same shapes to merge, got others than those of {blocks[0].name} at "
                f"{block.name}. Merge blocks of the dense model, or choose a repair that merges none."
            )
    return [block_tensors(block) for block in blocks]


@dataclass(frozen=True)
class Fitting:
    """Steps, batch and learning rate of the training of replacements.

    Args:
        steps: of AdamW.
        windows: calibration windows in a step.
        learning_rate: of the first step; it falls to a quarter along a cosine.
        seed: of the order of windows.

    Raises:
        ValueError: if a number is out of range.
    """

    steps: int = 32
    windows: int = 8
    learning_rate: float = 2e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "windows", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected `{name}` > 0, got {getattr(self, name)}.")


def nothing(
    anatomy: Anatomy, runs: Sequence[DroppedRun], tokens: Int[Tensor, "windows length"], fitting: Fitting
) -> dict[int, dict[str, Tensor]]:
    """No repair: the kept blocks are unchanged."""
    return {}
