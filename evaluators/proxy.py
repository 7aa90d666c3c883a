"""Losses without a forward pass: a closed form over statistics of the calibration set."""

from __future__ import annotations

import time
from collections.abc import Sequence

from secateur.evaluators.evaluator import Evaluator
from secateur.pruners.pruner import InfeasibleError, Pruner
from secateur.spaces.measurement import Fidelity, Measurement


class ProxyEvaluator(Evaluator):
    """Estimates losses at the part ``proxy``; another evaluator measures the other parts.

    Use it to choose candidates that are worth a measurement. It costs no tokens, and its losses compare with each
    other alone.

    Args:
        measured: the other evaluator.
        pruner: open; has the proxy.
    """

    def __init__(self, measured: Evaluator, pruner: Pruner) -> None:
        self._measured = measured
        self._pruner = pruner

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`.

        Raises:
            ValueError: if a text is no candidate of the space.
        """
        if fidelity.part != "proxy":
            return self._measured.evaluate(candidates, fidelity)
        return [self._estimated(text, fidelity) for text in candidates]

    def _estimated(self, text: str, fidelity: Fidelity) -> Measurement:
        space, started = self._pruner.space, time.perf_counter()
        candidate, values, reason = space.parse(text), {}, None
        try:
            loss = self._pruner.proxy_loss(space.config(candidate))
            values = {"loss": loss, **space.cost(candidate)}
        except InfeasibleError as error:
            reason = str(error)
        seconds = time.perf_counter() - started
        return Measurement(text, fidelity, values, reason, seed=self._pruner.seed, seconds=seconds)
