"""The evaluator of this project: block by block, with shared prefixes over a batch of candidates."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.evaluators.data import Batch, EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.losses import LossSums, loss_sums
from secateur.evaluators.prefix_tree import shared_work, walk
from secateur.evaluators.switching import Switcher
from secateur.pruners.families.anatomy import Anatomy
from secateur.pruners.runner import BlockRunner
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.space import Space


class BlockwiseEvaluator(Evaluator):
    """KL to the dense model and cross-entropy of candidates, on nested subsets of fixed windows.

    Blocks that several candidates of a batch share, from the embedding on, are computed once for each data
    batch. Losses accumulate in fp32 and up whatever the model's dtype.

    Args:
        anatomy: the dense model.
        space: parses candidates, knows their configuration and exact cost.
        switcher: switches blocks.
        data: the windows of both parts with the dense model's side of the loss.
        loss: which loss is reported as ``loss``.
        seed: which windows were drawn, for the record.
        worker: this worker's name, for the record.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        space: Space[Any],
        switcher: Switcher,
        data: EvaluationData,
        *,
        loss: Literal["kl", "ce"] = "kl",
        seed: int = 0,
        worker: str = "local",
    ) -> None:
        self._anatomy = anatomy
        self._space = space
        self._switcher = switcher
        self._data = data
        self._loss = loss
        self._seed = seed
        self._worker = worker
        self._runner = BlockRunner(anatomy)

    @torch.no_grad()
    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`; the order of the candidates does not change their values.

        Raises:
            ValueError: if a text is no candidate of the space, or the part has fewer tokens than the fidelity.
        """
        parsed = [self._space.parse(text) for text in candidates]
        paths = [self._switcher.keys(self._space.config(candidate)) for candidate in parsed]
        self._switcher.restore()
        batches = self._data.of(fidelity)
        started = time.perf_counter()
        sums = [LossSums()] * len(candidates)
        for batch in batches:
            self._add_batch(paths, batch, sums)
        seconds = (time.perf_counter() - started) / max(len(candidates), 1)
        work = shared_work(paths)
        return [
            self._measurement(
                candidate, fidelity, total, seconds, (computed * len(batches), saved * len(batches))
            )
            for candidate, total, computed, saved in zip(parsed, sums, work.computed, work.saved, strict=True)
        ]

    def _add_batch(self, paths: Sequence[Sequence[Hashable]], batch: Batch, sums: list[LossSums]) -> None:
        def step(block: int, key: Hashable, hidden: Tensor) -> Tensor:
            self._switcher.apply(block, key)
            return self._runner.block(block, hidden, batch.inputs)

        for members, hidden in walk(paths, batch.inputs.hidden, step):
            found = loss_sums(self._anatomy, hidden, batch.tokens, batch.teacher)
            for member in members:
                sums[member] = sums[member] + found

    def _measurement(
        self, candidate: Any, fidelity: Fidelity, sums: LossSums, seconds: float, blocks: tuple[int, int]
    ) -> Measurement:
        means = sums.means()
        finite = all(math.isfinite(value) for value in means.values())
        values = {"loss": means[self._loss], **means, **self._space.cost(candidate)}
        return Measurement(
            candidate=candidate.text,
            fidelity=fidelity,
            values=values if finite else {},
            infeasible=None if finite else "its loss is not finite: the pruned model overflows",
            seed=self._seed,
            n_tokens=fidelity.n_tokens,
            seconds=seconds,
            worker=self._worker,
            blocks=blocks[0],
            blocks_saved=blocks[1],
        )
