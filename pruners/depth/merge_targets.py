"""Runs of dropped blocks, and the kept block before each, which they are merged into."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy, Block


@dataclass(frozen=True)
class Run:
    """Consecutive blocks that are dropped.

    Args:
        heir: the block right before them.
        dropped: their indices, ascending.
    """

    heir: int
    dropped: tuple[int, ...]

    @property
    def end(self) -> int:
        """The block right behind them."""
        return self.dropped[-1] + 1


def runs_of(dropped: Sequence[int], n_blocks: int) -> tuple[Run, ...]:
    """The runs that some dropped blocks form, in order.

    Raises:
        ValueError: if block 0 or one that does not exist is dropped, or one is dropped twice.
    """
    if len(set(dropped)) < len(dropped) or not all(0 < index < n_blocks for index in dropped):
        raise ValueError(
            f"Expected `dropped` to be different blocks from 1 to {n_blocks - 1}, got {list(dropped)}. "
            "Block 0 always stays."
        )
    runs: list[list[int]] = []
    for index in sorted(dropped):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return tuple(Run(run[0] - 1, tuple(run)) for run in runs)


def scores_from(order: Sequence[int], n_blocks: int) -> tuple[float, ...]:
    """A score for each block, higher = keep: its place in the order of removal; kept blocks stand last."""
    scores = [math.inf] * n_blocks
    for place, index in enumerate(order):
        scores[index] = float(place)
    return tuple(scores)


def block_tensors(block: Block) -> dict[str, Tensor]:
    """All parameters of the live block, by their names in it: projections, biases and norms."""
    return {name: parameter.data for name, parameter in block.module.named_parameters()}


def point_block(block: Block, tensors: Mapping[str, Tensor]) -> None:
    """Point the live block's parameters to these tensors, by reference.

    Args:
        block: the block.
        tensors: for each of its parameters, by their names in it.
    """
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


def family_of(anatomy: Anatomy, run: Run) -> list[dict[str, Tensor]]:
    """Parameters of the heir, and of each block that it stands for.

    Raises:
        ValueError: if they differ in shape, so that they can't be merged.
    """
    found = [block_tensors(anatomy.blocks[index]) for index in (run.heir, *run.dropped)]
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in found]
    for index, other in zip(run.dropped, shapes[1:], strict=True):
        if other != shapes[0]:
            raise ValueError(
                f"Expected blocks of the same shapes to merge, got others than those of "
                f"{anatomy.blocks[run.heir].name} at {anatomy.blocks[index].name}. Merge blocks of the dense model, "
                "or choose a repair that merges none."
            )
    return found


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
