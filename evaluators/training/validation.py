"""Losses of a model that changes, beside those of the dense model, which does not."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.evaluators.data.windows import BATCH_TOKENS
from secateur.evaluators.losses import LossSums, Teacher, loss_sums
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner


def losses_on(
    anatomy: Anatomy, pairs: Iterable[tuple[Int[Tensor, "batch length"], Teacher]]
) -> dict[str, float]:
    """``kl`` and ``ce`` of a live model in nats per position, on token windows with the dense side of the loss."""
    sums = LossSums()
    with torch.no_grad():
        for tokens, teacher in pairs:
            sums += loss_sums(anatomy, _last_hidden(anatomy, tokens), tokens, teacher)
    return sums.means()


class Validation:
    """Measures on fixed windows; what `EvaluationData` keeps of the embedding would be wrong once that learns.

    Args:
        dense: the dense model with weights of its own.
        windows: token ids.
    """

    def __init__(self, dense: Anatomy, windows: Int[Tensor, "windows length"]) -> None:
        self._batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
        self._teachers = [
            Teacher(dense, partial(_last_hidden, dense, tokens), keep=False) for tokens in self._batches
        ]

    def losses(self, anatomy: Anatomy) -> dict[str, float]:
        """``kl`` and ``ce`` of a model, in nats per position; not finite if the model overflows."""
        return losses_on(anatomy, zip(self._batches, self._teachers, strict=True))


def _last_hidden(anatomy: Anatomy, tokens: Int[Tensor, "batch length"]) -> Tensor:
    """Output of the last block."""
    runner = BlockRunner(anatomy)
    return runner.run(runner.start(tokens))
