"""Accuracy and margins in tasks, beside the losses of another evaluator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.prefix_tree import Path
from secateur.evaluators.tasks.task_set import TaskSet, task_values
from secateur.pruners.pruner import Pruner
from secateur.spaces.measurement import Fidelity, Measurement


class TaskEvaluator(Evaluator):
    """Adds values ``task:<name>`` and ``margin:<name>`` to the measurements of another evaluator.

    The switched model computes whole sequences, so this takes longer than the losses. Both values come from the same
    log-likelihoods. They are measured at one fidelity; or at all of them if a margin is the loss: in the search on a
    share of the samples as large as the fidelity's of the tokens, nested, and in the test on other samples.

    Args:
        losses: measures everything else, with the same pruner.
        pruner: open; switches blocks of the live model.
        tasks: over the same live model.
        fidelity: the largest of the search.
        margin: name of the task whose `TaskResult.margin_loss` replaces ``loss``; None: no task's.
    """

    def __init__(
        self,
        losses: Evaluator,
        pruner: Pruner,
        tasks: TaskSet,
        fidelity: Fidelity,
        *,
        margin: str | None = None,
    ) -> None:
        self._losses = losses
        self._pruner = pruner
        self._tasks = tasks
        self._fidelity = fidelity
        self._margin = margin
        self._known: dict[tuple[Path, Fidelity], dict[str, float]] = {}

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`."""
        measured = self._losses.evaluate(candidates, fidelity)
        if self._margin is None and fidelity != self._fidelity:
            return measured
        return [self._with_tasks(m) for m in measured]

    def _with_tasks(self, measured: Measurement) -> Measurement:
        if measured.infeasible is not None:
            return measured
        started = time.perf_counter()
        space = self._pruner.space
        path = tuple(self._pruner.keys(space.config(space.parse(measured.candidate))))
        key = (path, measured.fidelity)
        if key not in self._known:
            self._known[key] = self._values(*key)
        seconds = measured.seconds + time.perf_counter() - started
        windows = measured.windows if self._margin is None else ()  # a margin's loss is of samples
        values = {**measured.values, **self._known[key]}
        return replace(measured, values=values, seconds=seconds, windows=windows)

    def _values(self, path: Path, fidelity: Fidelity) -> dict[str, float]:
        try:
            for block, key in enumerate(path):
                self._pruner.apply(block, key)
            self._pruner.finish(path[-1])
            if self._margin is None:
                return task_values(self._tasks.measure())
            found = self._tasks.measure(self._samples(fidelity))
            return task_values(found) | {"loss": found[self._margin].margin_loss}
        finally:
            self._pruner.restore()

    def _samples(self, fidelity: Fidelity) -> dict[str, list[int]]:
        if fidelity.part == "test":
            return self._tasks.held_out()
        return self._tasks.first(fidelity.n_tokens / self._fidelity.n_tokens)
