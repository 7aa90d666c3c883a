"""LaCo: dropped blocks merged into the block before them, as a sum of differences."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import stream_states
from secateur.pruners.depth.merge_targets import (
    DroppedRun,
    Fitting,
    merged_tensors,
    pointed,
    runs_of,
    scores_from,
)
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner

THRESHOLDS = (0.9, 0.75, 0.6, 0.45)
"""Similarities above which a merge is accepted; 0.45 to 0.75 are the paper's."""

N_SENTENCES, SENTENCE_TOKENS = 5, 32


@torch.no_grad()
def summed_differences(anatomy: Anatomy, run: DroppedRun) -> dict[str, Tensor]:
    """Parameters of the merge target with those of the dropped blocks merged in, from the dense model.

    ``theta* = theta_l + sum over i of (theta_l+i - theta_l)`` (LaCo, Yang et al. 2024, arXiv 2402.11187, the
    rule in its text). The released code subtracts the weight merged so far instead, which telescopes to
    ``theta_l+k``: the last of the blocks, with the norms of the first. This is what the text says, for norms and
    biases too. A single dropped block replaces its merge target, in effect.

    Sums in fp32; the result has the dtype of the model.
    """
    first, *others = merged_tensors(anatomy, run)
    merged = {}
    for name, theta in first.items():
        total = sum(other[name].float() for other in others)
        merged[name] = (total - (len(others) - 1) * theta.float()).to(theta.dtype)
    return merged


def by_acceptance(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Blocks in the order in which their merge into the block before was accepted (LaCo, algorithm 1).

    From the last block down each is merged tentatively, along with those merged before; the merge is accepted if the
    mean cosine of the model's last hidden states, normed, with those of the dense one exceeds a threshold.
    Sentences are the first 32 tokens of five windows, each one vector. To give one order for all budgets the
    threshold falls from pass to pass (`THRESHOLDS`), and one block is merged at a time, where the paper fixes the
    threshold and the number of blocks in one merge; blocks that no pass accepted follow from the last down. Every
    merge is `summed_differences` of dense blocks. It takes half as many short forward passes as blocks times
    thresholds.
    """
    trial = _Trial(anatomy, tokens[:N_SENTENCES, :SENTENCE_TOKENS])
    downwards = range(len(anatomy.blocks) - 1, 0, -1)
    order: list[int] = []
    for threshold in THRESHOLDS:
        for index in downwards:
            if index not in order and trial.similarity([*order, index]) > threshold:
                order.append(index)
    rest = (index for index in downwards if index not in order)
    return scores_from([*order, *rest], len(anatomy.blocks))


class _Trial:
    """Merged models next to the dense one, on a few tokens.

    Args:
        anatomy: the dense model.
        tokens: a sentence a row.
    """

    def __init__(self, anatomy: Anatomy, tokens: Int[Tensor, "sentences length"]) -> None:
        self._anatomy, self._runner = anatomy, BlockRunner(anatomy)
        self._inputs = self._runner.start(tokens)
        self._states = list(stream_states(anatomy, tokens))
        self._wanted = self._vectors(self._states[-1])

    def similarity(self, dropped: Sequence[int]) -> float:
        """Mean cosine, over the sentences, between the model without these blocks and the dense one."""
        runs = {run.target: run for run in runs_of(dropped, len(self._anatomy.blocks))}
        first = min(runs)
        hidden = self._states[first]
        for block in self._anatomy.blocks[first:]:
            if block.index in dropped:
                continue
            run = runs.get(block.index)
            with pointed(block, summed_differences(self._anatomy, run)) if run else nullcontext():
                hidden = self._runner.block(block.index, hidden, self._inputs)
        return float(cosine_similarity(self._vectors(hidden), self._wanted, dim=1).mean())

    @torch.no_grad()
    def _vectors(
        self, hidden: Float[Tensor, "sentences length width"]
    ) -> Float[Tensor, "sentences features"]:
        return self._anatomy.tail(hidden).double().flatten(1)


def merged(
    anatomy: Anatomy, runs: Sequence[DroppedRun], tokens: Int[Tensor, "windows length"], fitting: Fitting
) -> dict[int, dict[str, Tensor]]:
    """`summed_differences` of each run."""
    return {run.target: summed_differences(anatomy, run) for run in runs}
