"""Distillation of blocks' outputs between two states of one model, some of whose blocks may have lost all units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from secateur.pruners.learned.low_rank import first_right
from secateur.pruners.models.anatomy import Anatomy

PAIRS = 4
"""Blocks of the teacher that are compared in a step."""

States = Float[Tensor, "batch length width"]


class Transformation:
    """Low-rank transformation of the stream, ``x + scale B A x``, at first the identity.

    Args:
        width: of the stream.
        rank: of the matrix.
        scale: of it.
        generator: of the first values of A, on the CPU.
        device: of the tensors.
    """

    def __init__(
        self, width: int, rank: int, scale: float, generator: torch.Generator, device: torch.device
    ) -> None:
        self._scale = scale
        self.right = first_right(rank, width, generator).to(device).requires_grad_()
        self.left = torch.zeros(width, rank, device=device, requires_grad=True)

    def outputs(self, states: States) -> States:
        """Transformed states."""
        return states + self._scale * F.linear(F.linear(states, self.right), self.left)


class LowestLoss:
    """Mean of the losses since the last look, and the lowest such mean.

    Args:
        device: of the tensor.

    Attributes:
        values: sum of the losses since the last look, their number, and the lowest mean so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.tensor([0.0, 0.0, torch.inf], device=device)

    def note(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Count a loss, which is given back."""
        self.values[:2] += torch.stack([loss.detach(), torch.ones_like(loss)])
        return loss

    def look(self) -> bool:
        """True if the mean of the losses since the last look is the lowest so far."""
        total, number, lowest = self.values.tolist()
        is_lowest = total / number < lowest
        self.values.copy_(torch.tensor([0.0, 0.0, total / number if is_lowest else lowest]))
        return bool(is_lowest)


@contextmanager
def block_outputs(anatomy: Anatomy) -> Iterator[list[States]]:
    """Context that lists the outputs of the blocks as they are computed, with gradients where they are enabled."""
    found: list[Tensor] = []

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for block in anatomy.blocks:
            hooks.callback(block.module.register_forward_hook(after).remove)
        yield found


def drawn_blocks(n_blocks: int, generator: torch.Generator) -> list[int]:
    """One block out of each of four equal runs of blocks, as RAIL-KD (arXiv 2109.10164); all if there are fewer."""
    n_runs = min(PAIRS, n_blocks)
    starts = [run * n_blocks // n_runs for run in range(n_runs + 1)]
    return [int(torch.randint(first, end, (), generator=generator)) for first, end in pairwise(starts)]


def nearest_blocks(index: int, stays: Sequence[bool]) -> list[int]:
    """The block itself if it stays, else the nearest ones before and behind it that do."""
    if stays[index]:
        return [index]
    before = [other for other in range(index) if stays[other]]
    behind = [other for other in range(index + 1, len(stays)) if stays[other]]
    return [*before[-1:], *behind[:1]]


def layer_loss(
    student: Sequence[States],
    teacher: Sequence[States],
    stays: Sequence[bool],
    transform: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Mean square of the student's transformed outputs minus the teacher's, added up over drawn blocks of the teacher.

    A block of the teacher is compared with `nearest_blocks` of the student, and the closer one counts. 0 if no block
    stays.

    Args:
        student: outputs of its blocks.
        teacher: likewise.
        stays: whether the student's block still has units in each of its sub-layers.
        transform: of the student's outputs.
        generator: on the CPU.
    """
    total = teacher[0].new_zeros(())
    for index in drawn_blocks(len(teacher), generator):
        losses = [F.mse_loss(transform(student[x]), teacher[index]) for x in nearest_blocks(index, stays)]
        if losses:
            total = total + torch.stack(losses).min()
    return total
