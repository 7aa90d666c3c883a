"""Block-wise evaluation of candidates, with shared prefixes computed once."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from secateur.evaluators.data.windows import Batch, EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.losses import LossSums, LossValues, loss_values, minimised
from secateur.evaluators.prefix_tree import Path, walk
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.pruner import InfeasibleError, Pruner
from secateur.pruners.stores.recent import Recent
from secateur.spaces.measurement import Fidelity, Measurement

MIN_PREFIX_BYTES, MAX_PREFIX_BYTES = 1 << 26, 1 << 30
"""Bounds of a worker's cache of block outputs on a CPU, which is a sixteenth of the model's bytes."""

MIN_CHANGED_BYTES, MAX_CHANGED_BYTES = 1 << 28, 1 << 30
"""Likewise of changed blocks that are copies, for the next candidate."""


class BlockwiseEvaluator(Evaluator):
    """KL to the dense model, cross-entropy and other losses of candidates, on nested subsets of fixed windows.

    Blocks that several candidates share, from the embedding on, are computed once for each data batch: within a batch
    of candidates always, with earlier ones as far as the cache holds them. Outputs that a batch of candidates shared
    stay in it the longest: they are their parent's, and the next offspring begin with them, too. A candidate's losses
    on a data batch are remembered, so that a larger fidelity costs only its further data. Losses accumulate in fp32
    and up whatever the model's dtype.

    Args:
        pruner: open; switches blocks of the dense model by the candidates of its space.
        data: the windows of both parts with the dense model's side of the loss.
        loss: name of the mean that is reported as ``loss``, see `minimised`.
    """

    def __init__(self, pruner: Pruner, data: EvaluationData, *, loss: str = "kl") -> None:
        self._pruner = pruner
        self._anatomy = pruner.anatomy
        self._data = data
        self._loss = loss
        self._runner = data.runner
        # Outputs of blocks by the path to them.
        self._prefixes = Recent[Tensor](prefix_bytes(pruner.anatomy))
        self._n_kept = _n_kept(pruner.anatomy)
        self._sums: dict[tuple[str, Path], LossSums] = {}

    @torch.no_grad()
    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`; neither order nor company nor history of candidates changes their losses.

        Raises:
            ValueError: if a text is no candidate of the space, or the evaluator was not made for the fidelity.
        """
        parsed = [self._pruner.space.parse(text) for text in candidates]
        batches = self._data.of(fidelity)
        started = time.perf_counter()
        found = [self._path(candidate) for candidate in parsed]
        paths = [path for path in found if not isinstance(path, str)]
        known = {path for path in paths if all((batch.name, path) in self._sums for batch in batches)}
        computed = [0] * len(paths)
        try:
            for batch in batches:
                self._add_batch(paths, batch, computed)
        finally:
            self._pruner.restore()  # nothing leaks into the next candidate, nor into the dense side
        seconds = (time.perf_counter() - started) / max(len(candidates), 1)
        n_blocks, blocks, measurements = len(self._anatomy.blocks) * len(batches), iter(computed), []
        for candidate, path in zip(parsed, found, strict=True):
            record: dict[str, Any] = {"seed": self._pruner.seed, "seconds": seconds}
            if isinstance(path, str):
                measurements.append(Measurement(candidate.text, fidelity, infeasible=path, **record))
                continue
            n = next(blocks)
            # No tokens if another candidate with the same weights was measured.
            record["n_tokens"] = 0 if path in known else fidelity.n_tokens + self._trained_on(candidate)
            record |= {"blocks": n, "blocks_saved": n_blocks - n}
            sums = sum((self._sums[batch.name, path] for batch in batches), LossSums())
            values, reason = self._values(candidate, sums.means())
            if reason is None and fidelity.part == "test":
                record["windows"] = sums.window_losses(self._loss)
            measurements.append(Measurement(candidate.text, fidelity, values, reason, **record))
        return measurements

    def _values(self, candidate: Any, losses: dict[str, float]) -> tuple[dict[str, float], str | None]:
        """The values, or the reason for none."""
        if not all(math.isfinite(value) for value in losses.values()):
            return {}, "its loss is not finite: the pruned model overflows"
        return {"loss": minimised(self._loss, losses), **losses, **self._pruner.cost(candidate)}, None

    def _trained_on(self, candidate: Any) -> int:
        return self._pruner.training_tokens(self._pruner.space.config(candidate))

    def _path(self, candidate: Any) -> Path | str:
        """Key of each block, or the reason why there is none."""
        try:
            return tuple(self._pruner.keys(self._pruner.space.config(candidate)))
        except InfeasibleError as error:
            return str(error)

    def _add_batch(self, paths: Sequence[Path], batch: Batch, computed: list[int]) -> None:
        """Add losses of all paths on one data batch to `_sums`; blocks computed count for their first member."""
        new = [member for member, path in enumerate(paths) if (batch.name, path) not in self._sums]
        if not new:
            return
        distinct = {paths[member] for member in new}
        sharing = Counter(path[: depth + 1] for path in distinct for depth in range(len(path)))

        def step(path: Path, member: int, hidden: Tensor) -> Tensor:
            def compute() -> Tensor:
                block = len(path) - 1
                self._pruner.apply(block, path[-1])
                computed[new[member]] += 1
                below = self._runner.block(block, hidden, batch.inputs)
                if self._pruner.copies and block >= self._n_kept:
                    self._pruner.release(block)
                return below

            alone = len(distinct) > 1 == sharing[path]
            return self._prefixes.get((batch.name, path), compute, first_to_go=alone)

        measured: dict[Path, LossValues] = {}
        for members, hidden in walk([paths[member] for member in new], batch.inputs.hidden, step):
            self._pruner.finish(paths[new[members[0]]][-1])
            measured[paths[new[members[0]]]] = loss_values(self._anatomy, hidden, batch.tokens, batch.teacher)
        for path, sums in zip(measured, LossValues.read(list(measured.values())), strict=True):
            self._sums[batch.name, path] = sums


def prefix_bytes(anatomy: Anatomy) -> int:
    """Limit of a worker's cache of block outputs."""
    if anatomy.room is not None:
        return anatomy.room.states
    return _share(anatomy, MIN_PREFIX_BYTES, MAX_PREFIX_BYTES)


def changed_bytes(anatomy: Anatomy) -> int:
    """Largest number of bytes of changed blocks that are copies: those that are kept, and the one that is computed."""
    sizes = _block_sizes(anatomy)
    n_kept = _n_kept(anatomy)
    return sum(sizes[:n_kept]) + max(sizes[n_kept:], default=0)


def _block_sizes(anatomy: Anatomy) -> list[int]:
    return [sum(x.weight.nbytes for x in block.linears) for block in anatomy.blocks]


def _share(anatomy: Anatomy, least: int, most: int) -> int:
    n_bytes = sum(parameter.nbytes for parameter in anatomy.model.parameters())
    return min(max(least, n_bytes // 16), most)


def _n_kept(anatomy: Anatomy) -> int:
    """Number of copied blocks that are kept until they are changed again: the first ones.

    Each candidate uses all blocks in turn, so that a cache of the blocks used last would have none when it is needed.
    """
    sizes = accumulate(_block_sizes(anatomy))
    room = anatomy.room
    limit = _share(anatomy, MIN_CHANGED_BYTES, MAX_CHANGED_BYTES) if room is None else room.changed
    return bisect_right([*sizes], limit)
