"""The evaluator of this project: block by block, with shared prefixes over candidates."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.evaluators.data.windows import Batch, EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.losses import LossSums, loss_sums
from secateur.evaluators.prefix_tree import Path, walk
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.pruner import InfeasibleError, Pruner
from secateur.pruners.stores.recent import Recent
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.space import Space

MIN_PREFIX_BYTES, MAX_PREFIX_BYTES = 1 << 26, 1 << 30
"""Outputs of blocks are kept for later batches up to a sixteenth of the model's bytes, within these bounds: every
worker keeps its own."""

MIN_CHANGED_BYTES, MAX_CHANGED_BYTES = 1 << 28, 1 << 30
"""Likewise changed blocks that are copies, for the next candidate."""


class BlockwiseEvaluator(Evaluator):
    """KL to the dense model and cross-entropy of candidates, on nested subsets of fixed windows.

    Blocks that several candidates share, from the embedding on, are computed once for each data batch: within
    a batch of candidates always, with earlier ones as long as memory for it lasts. A candidate's losses on a data
    batch are remembered, so that a larger fidelity costs only its further data. Losses accumulate in fp32 and up
    whatever the model's dtype.

    Args:
        anatomy: the dense model.
        space: parses candidates, knows their configuration and exact cost.
        pruner: switches blocks.
        data: the windows of both parts with the dense model's side of the loss.
        loss: which loss is reported as ``loss``.
        seed: which windows were drawn, for the record.
        worker: this worker's name, for the record.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        space: Space[Any],
        pruner: Pruner,
        data: EvaluationData,
        *,
        loss: Literal["kl", "ce"] = "kl",
        seed: int = 0,
        worker: str = "local",
    ) -> None:
        self._anatomy = anatomy
        self._space = space
        self._pruner = pruner
        self._data = data
        self._loss = loss
        self._seed = seed
        self._worker = worker
        self._runner = BlockRunner(anatomy)
        # Outputs of blocks by the path to them.
        self._prefixes = Recent[Tensor](_share(anatomy, MIN_PREFIX_BYTES, MAX_PREFIX_BYTES))
        self._n_stay = _n_stay(anatomy)
        self._sums: dict[tuple[str, Path], LossSums] = {}

    @torch.no_grad()
    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`; neither order nor company nor history of candidates changes their losses.

        Raises:
            ValueError: if a text is no candidate of the space, or the evaluator was not made for the fidelity.
        """
        parsed = [self._space.parse(text) for text in candidates]
        batches = self._data.of(fidelity)
        started = time.perf_counter()
        turned = [self._path(candidate) for candidate in parsed]
        paths = [path for path in turned if not isinstance(path, str)]
        known = {path for path in paths if all((batch.name, path) in self._sums for batch in batches)}
        computed = [0] * len(paths)
        try:
            for batch in batches:
                self._add_batch(paths, batch, computed)
        finally:
            self._pruner.restore()  # nothing leaks into the next candidate, nor into the dense side
        seconds = (time.perf_counter() - started) / max(len(candidates), 1)
        n_blocks = len(self._anatomy.blocks) * len(batches)
        blocks, measurements = iter(computed), []
        for candidate, path in zip(parsed, turned, strict=True):
            if isinstance(path, str):
                measurements.append(self._infeasible(candidate, fidelity, path, seconds))
                continue
            sums = sum((self._sums[batch.name, path] for batch in batches), LossSums())
            n = next(blocks)
            measurements.append(
                self._measurement(candidate, fidelity, sums, seconds, (n, n_blocks - n), again=path in known)
            )
        return measurements

    def _path(self, candidate: Any) -> Path | str:
        """The candidate's key of each block, or the reason why it has none."""
        try:
            return tuple(self._pruner.keys(self._space.config(candidate)))
        except InfeasibleError as error:
            return str(error)

    def _add_batch(self, paths: Sequence[Path], batch: Batch, computed: list[int]) -> None:
        """Losses of all paths on one data batch into `_sums`; blocks computed are added to their first member."""
        new = [member for member, path in enumerate(paths) if (batch.name, path) not in self._sums]
        if not new:
            return

        def step(path: Path, member: int, hidden: Tensor) -> Tensor:
            def compute() -> Tensor:
                block = len(path) - 1
                self._pruner.apply(block, path[-1])
                computed[new[member]] += 1
                below = self._runner.block(block, hidden, batch.inputs)
                if self._pruner.copies and block >= self._n_stay:
                    self._pruner.release(block)
                return below

            return self._prefixes.get((batch.name, path), compute)

        for members, hidden in walk([paths[member] for member in new], batch.inputs.hidden, step):
            found = loss_sums(self._anatomy, hidden, batch.tokens, batch.teacher)
            self._sums[batch.name, paths[new[members[0]]]] = found

    def _measurement(
        self,
        candidate: Any,
        fidelity: Fidelity,
        sums: LossSums,
        seconds: float,
        blocks: tuple[int, int],
        *,
        again: bool,
    ) -> Measurement:
        means = sums.means()
        finite = all(math.isfinite(value) for value in means.values())
        values = {"loss": means[self._loss], **means, **self._pruner.cost(candidate)}
        return Measurement(
            candidate=candidate.text,
            fidelity=fidelity,
            values=values if finite else {},
            infeasible=None if finite else "its loss is not finite: the pruned model overflows",
            seed=self._seed,
            n_tokens=0
            if again
            else fidelity.n_tokens,  # another candidate with the same weights was measured
            seconds=seconds,
            worker=self._worker,
            blocks=blocks[0],
            blocks_saved=blocks[1],
        )

    def _infeasible(self, candidate: Any, fidelity: Fidelity, reason: str, seconds: float) -> Measurement:
        return Measurement(
            candidate.text,
            fidelity,
            infeasible=reason,
            seed=self._seed,
            seconds=seconds,
            worker=self._worker,
        )


def _share(anatomy: Anatomy, least: int, most: int) -> int:
    n_bytes = sum(parameter.nbytes for parameter in anatomy.model.parameters())
    return min(max(least, n_bytes // 16), most)


def _n_stay(anatomy: Anatomy) -> int:
    """How many copied blocks stay until they are changed again: the first ones.

    Candidates come to all blocks in turn, so that of those used last none would be there when it is needed.
    """
    sizes = accumulate(sum(x.weight.nbytes for x in block.linears) for block in anatomy.blocks)
    return bisect_right([*sizes], _share(anatomy, MIN_CHANGED_BYTES, MAX_CHANGED_BYTES))
