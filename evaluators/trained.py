"""Light training as part of a measurement: a candidate is cut, trained for a moment, measured and thrown away."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from secateur.evaluators.data.windows import EvaluationData, sums_on
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.losses import LossSums, minimised
from secateur.evaluators.prefix_tree import Path
from secateur.evaluators.training.settings import Training
from secateur.evaluators.training.trainer import Trainer
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.pruner import InfeasibleError, Pruner
from secateur.pruners.stores.recent import Recent
from secateur.spaces.measurement import Fidelity, Measurement

STATE_BYTES = 2 << 30
"""Limit of the kept weights and optimizers of the candidates trained last, to continue from."""


class TrainedEvaluator(Evaluator):
    """Trains a candidate before measuring it, at fidelities with training.

    DarwinLM (https://arxiv.org/abs/2502.07780) trains in bfloat16 with the removed structure in place, and every
    survivor from the start again. Here a candidate is a copy of the switched model with fp32 weights of its own,
    without the removed structure (zeros stay zeros), and a longer training continues a shorter one. All candidates see
    the same windows in the same order at a constant rate, so that the result depends on the candidate and the seed
    alone: a training that was forgotten is repeated bit by bit.

    The dense model is measured untrained: it has nothing to recover from.

    Args:
        untrained: measures at fidelities without training.
        pruner, data: of `untrained`; the pruner's dense model is the teacher.
        training: settings; a fidelity says how far candidates are trained.
        windows: to train on, none of which is measured on.
        loss: name of the mean that is reported as ``loss``, see `minimised`.
    """

    def __init__(
        self,
        untrained: Evaluator,
        pruner: Pruner,
        data: EvaluationData,
        training: Training,
        windows: Int[Tensor, "windows length"],
        *,
        loss: str = "kl",
    ) -> None:
        self._untrained = untrained
        self._pruner = pruner
        self._data = data
        self._training = training
        self._windows = windows
        self._loss = loss
        self._states = Recent[Mapping[str, Any]](STATE_BYTES)
        self._teacher_states: dict[int, Tensor] = {}
        self._known: dict[tuple[Path, Fidelity], LossSums | str] = {}
        self._dense = self._path(pruner.space.baselines()["dense"])

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`; neither order nor company nor history of candidates changes their losses.

        Raises:
            ValueError: if a text is no candidate of the space, or the evaluator was not made for the fidelity.
        """
        if not fidelity.n_trained:
            return self._untrained.evaluate(candidates, fidelity)
        self._data.of(fidelity)  # prepared while the model is dense
        return [self._measure(text, fidelity) for text in candidates]

    def _measure(self, text: str, fidelity: Fidelity) -> Measurement:
        started, candidate = time.perf_counter(), self._pruner.space.parse(text)
        record: dict[str, Any] = {"seed": self._pruner.seed}
        try:
            path = self._path(candidate)
        except InfeasibleError as error:
            return Measurement(text, fidelity, infeasible=str(error), **record)
        if path == self._dense:
            (measured,) = self._untrained.evaluate([text], replace(fidelity, n_trained=0))
            return replace(measured, fidelity=fidelity)
        again = (path, fidelity) in self._known  # another candidate with the same weights was measured
        if not again:
            self._known[path, fidelity] = self._trained_losses(path, fidelity)
        sums = self._known[path, fidelity]
        config = self._pruner.space.config(candidate)
        record["n_tokens"] = 0 if again else fidelity.total_tokens + self._pruner.training_tokens(config)
        record["seconds"] = time.perf_counter() - started
        if isinstance(sums, str):
            return Measurement(text, fidelity, infeasible=sums, **record)
        if fidelity.part == "test":
            record["windows"] = sums.window_losses(self._loss)
        losses = sums.means()
        values = {"loss": minimised(self._loss, losses), **losses, **self._pruner.cost(candidate)}
        return Measurement(text, fidelity, values, **record)

    def _path(self, candidate: Any) -> Path:
        return tuple(self._pruner.keys(self._pruner.space.config(candidate)))

    def _trained_losses(self, path: Path, fidelity: Fidelity) -> LossSums | str:
        """Sums of the losses after training, or the reason for none."""
        trainee = self._cut(path)
        teacher = self._pruner.anatomy
        trainer = Trainer(trainee, self._training, self._windows, teacher, self._teacher_states)
        n_steps = fidelity.n_trained // (self._training.batch * self._windows.shape[1])
        state = self._states.take(path)  # training changes it
        if state is not None and state["step"] <= n_steps:
            trainer.load_state_dict(state)
        trainer.train(n_steps - trainer.step)
        if trainer.failure is not None:
            return trainer.failure
        self._states.put(path, trainer.state_dict())
        trainer.finish()
        pairs = ((batch.tokens, batch.teacher) for batch in self._data.of(fidelity))
        sums = sums_on(trainee, pairs)
        if not all(math.isfinite(value) for value in sums.means().values()):
            return f"training diverged: after {fidelity.n_trained} tokens its loss is not finite"
        return sums

    def _cut(self, path: Path) -> Anatomy:
        """A model of its own, pruned; its weights are shared until it trains."""
        try:
            for block, key in enumerate(path):
                self._pruner.apply(block, key)
            self._pruner.finish(path[-1])
            return own_modules(self._pruner.anatomy)
        finally:
            self._pruner.restore()


def own_modules(anatomy: Anatomy) -> Anatomy:
    """Copy of a live model with the same weights, whose parameters can be pointed elsewhere independently."""
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in anatomy.model.parameters()}
    return copy.deepcopy(anatomy, shared)
