"""Measurements without a forward pass: a closed form over what was collected on the calibration set."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.evaluators.evaluator import Evaluator
from secateur.pruners.pruner import InfeasibleError, Pruner
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.space import Space


class ProxyEvaluator(Evaluator):
    """Answers the part ``proxy`` by a proxy, and leaves the others to another evaluator.

    Use it to choose what is worth measuring. It costs no tokens, and its losses compare with each other alone.

    Args:
        measured: the other evaluator.
        space: parses candidates, knows their configuration and exact cost.
        pruner: foretells losses.
        seed: which windows were drawn, for the record.
        worker: this worker's name, for the record.
    """

    def __init__(
        self, measured: Evaluator, space: Space[Any], pruner: Pruner, *, seed: int = 0, worker: str = "local"
    ) -> None:
        self._measured = measured
        self._space = space
        self._pruner = pruner
        self._seed = seed
        self._worker = worker

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`.

        Raises:
            ValueError: if a text is no candidate of the space.
        """
        if fidelity.part != "proxy":
            return self._measured.evaluate(candidates, fidelity)
        return [self._foretold(text, fidelity) for text in candidates]

    def _foretold(self, text: str, fidelity: Fidelity) -> Measurement:
        candidate, started = self._space.parse(text), time.perf_counter()
        values: Mapping[str, float] = {}
        reason = None
        try:
            values = {
                "loss": self._pruner.proxy_loss(self._space.config(candidate)),
                **self._space.cost(candidate),
            }
        except InfeasibleError as error:
            reason = str(error)
        seconds = time.perf_counter() - started
        return Measurement(
            text, fidelity, values, reason, seed=self._seed, seconds=seconds, worker=self._worker
        )
