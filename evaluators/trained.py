"""Light training as part of a measurement: the candidate is cut, trained for a moment, measured and thrown away."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor, nn

from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.prefix_tree import Path
from secateur.evaluators.training.recipe import Recipe
from secateur.evaluators.training.trainer import Trainer
from secateur.evaluators.training.validation import losses_on
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.pruner import InfeasibleError, Pruner
from secateur.pruners.stores.recent import Recent
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.space import Space

STATE_BYTES = 2 << 30
"""Weights and optimizers of the candidates trained last are kept up to so many bytes, to go on with them."""


class TrainedEvaluator(Evaluator):
    """Trains a candidate before it measures it, where the fidelity says so.

    DarwinLM (https://arxiv.org/abs/2502.07780) trains in bfloat16 with the removed structure in place, and every
    survivor from the start again. Here a candidate is a copy of the switched model with fp32 weights of its own, from
    which what was removed is really gone (and where zeros stay zeros), and a longer training goes on where a shorter
    one ended. All candidates see the same windows in the same order at a constant rate, so that the result depends on
    the candidate and the seed alone: a training that was forgotten is repeated bit by bit.

    The dense model is measured as it is: it has nothing to recover from.

    Args:
        untrained: answers fidelities without training.
        anatomy: the dense model; it is also what is distilled from.
        space, pruner, data: of `untrained`.
        recipe: how to train, up to its end at most.
        windows: to train on, none of which is measured on.
        loss: which loss is reported as ``loss``.
        seed, worker: for the record.
    """

    def __init__(
        self,
        untrained: Evaluator,
        anatomy: Anatomy,
        space: Space[Any],
        pruner: Pruner,
        data: EvaluationData,
        recipe: Recipe,
        windows: Int[Tensor, "windows length"],
        *,
        loss: Literal["kl", "ce"] = "kl",
        seed: int = 0,
        worker: str = "local",
    ) -> None:
        self._untrained = untrained
        self._anatomy = anatomy
        self._space = space
        self._pruner = pruner
        self._data = data
        self._recipe = recipe
        self._windows = windows
        self._loss = loss
        self._record: dict[str, Any] = {"seed": seed, "worker": worker}
        self._states = Recent[Mapping[str, Any]](STATE_BYTES)
        self._seen: dict[int, Tensor] = {}  # the dense model's side of each step
        self._known: dict[tuple[Path, Fidelity], dict[str, float] | str] = {}
        self._dense = self._path(space.baselines()["dense"])

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
        started, candidate = time.perf_counter(), self._space.parse(text)
        try:
            path = self._path(candidate)
        except InfeasibleError as error:
            return Measurement(text, fidelity, infeasible=str(error), **self._record)
        if path == self._dense:
            (measured,) = self._untrained.evaluate([text], replace(fidelity, n_trained=0))
            return replace(measured, fidelity=fidelity)
        again = (path, fidelity) in self._known  # another candidate with the same weights was measured
        if not again:
            self._known[path, fidelity] = self._trained_losses(path, fidelity)
        losses = self._known[path, fidelity]
        costs: dict[str, Any] = {
            "n_tokens": 0 if again else fidelity.total_tokens,
            "seconds": time.perf_counter() - started,
        }
        if isinstance(losses, str):
            return Measurement(text, fidelity, infeasible=losses, **costs, **self._record)
        values = {"loss": losses[self._loss], **losses, **self._pruner.cost(candidate)}
        return Measurement(text, fidelity, values, **costs, **self._record)

    def _path(self, candidate: Any) -> Path:
        return tuple(self._pruner.keys(self._space.config(candidate)))

    def _trained_losses(self, path: Path, fidelity: Fidelity) -> dict[str, float] | str:
        """``kl`` and ``ce`` after training, or the reason why there are none."""
        trainee = self._cut(path)
        trainer = Trainer(trainee, self._recipe, self._windows, self._anatomy, self._seen)
        n_steps = fidelity.n_trained // (self._recipe.batch * self._windows.shape[1])
        state = self._states.take(path)  # going on with it changes it
        if state is not None and state["step"] <= n_steps:
            trainer.load_state_dict(state)
        trainer.train(n_steps - trainer.step)
        if trainer.failure is not None:
            return trainer.failure
        self._states.put(path, trainer.state_dict())
        trainer.finish()
        pairs = ((batch.tokens, batch.teacher) for batch in self._data.of(fidelity))
        losses = losses_on(trainee, pairs)
        if not all(math.isfinite(value) for value in losses.values()):
            return f"training diverged: after {fidelity.n_trained} tokens its loss is not finite"
        return losses

    def _cut(self, path: Path) -> Anatomy:
        """A model of its own that is what the path says; its weights are shared until it trains."""
        try:
            for block, key in enumerate(path):
                self._pruner.apply(block, key)
            return own_modules(self._anatomy)
        finally:
            self._pruner.restore()


def own_modules(anatomy: Anatomy) -> Anatomy:
    """A copy of a live model whose parameters point to the same weights: either may be pointed elsewhere alone."""
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in anatomy.model.parameters()}
    return copy.deepcopy(anatomy, shared)
