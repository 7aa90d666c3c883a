"""Accuracy in tasks, beside the losses of another evaluator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.prefix_tree import Path
from secateur.evaluators.tasks.task_set import TaskSet
from secateur.pruners.pruner import Pruner
from secateur.spaces.measurement import Fidelity, Measurement


class TaskEvaluator(Evaluator):
    """Adds values ``task:<name>`` to the measurements of another evaluator, at one fidelity.

    The switched model computes whole sequences, so this takes longer than the losses.

    Args:
        losses: measures everything else, with the same pruner.
        pruner: open; switches blocks of the live model.
        tasks: over the same live model.
        fidelity: the largest of the search.
    """

    def __init__(self, losses: Evaluator, pruner: Pruner, tasks: TaskSet, fidelity: Fidelity) -> None:
        self._losses = losses
        self._pruner = pruner
        self._tasks = tasks
        self._fidelity = fidelity
        self._known: dict[Path, dict[str, float]] = {}

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`."""
        measured = self._losses.evaluate(candidates, fidelity)
        return [self._with_tasks(m) for m in measured] if fidelity == self._fidelity else measured

    def _with_tasks(self, measured: Measurement) -> Measurement:
        if measured.infeasible is not None:
            return measured
        started = time.perf_counter()
        space = self._pruner.space
        path = tuple(self._pruner.keys(space.config(space.parse(measured.candidate))))
        if path not in self._known:
            self._known[path] = self._scores(path)
        seconds = measured.seconds + time.perf_counter() - started
        return replace(measured, values={**measured.values, **self._known[path]}, seconds=seconds)

    def _scores(self, path: Path) -> dict[str, float]:
        try:
            for block, key in enumerate(path):
                self._pruner.apply(block, key)
            return {f"task:{name}": result.score for name, result in self._tasks.measure().items()}
        finally:
            self._pruner.restore()
