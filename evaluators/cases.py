"""Cases: the models, sparsities and patterns that one candidate is measured in, with an evaluator of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.effects import EffectsEvaluator
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.plan import SessionPlan
from secateur.evaluators.proxy import ProxyEvaluator
from secateur.evaluators.tasks.evaluator import TaskEvaluator
from secateur.evaluators.tasks.task_set import TaskSet
from secateur.evaluators.trained import TrainedEvaluator
from secateur.pruners.calibration.tokens import Calibration
from secateur.pruners.curvature import load_curvature
from secateur.pruners.effects import Foretelling
from secateur.pruners.pruner import DenseModel, Pruner, pruner_class
from secateur.spaces.measurement import Fidelity, Measurement

MAIN = "main"
"""Name of the case that a plan itself describes."""


@dataclass(frozen=True)
class Case:
    """One plan that candidates are measured by on a session's model.

    Args:
        plan: of the case.
        space: of its candidates.
        dense: the live model, with the sizes that costs of the case are counted from.
        calibration: data; None in workers, which open the prepared store.
    """

    plan: SessionPlan
    space: Any
    dense: DenseModel
    calibration: Calibration | None = None

    def pruner(self) -> Pruner:
        """A new pruner of the case."""
        settings = self.plan.space
        return pruner_class(settings)(
            settings, self.dense, space=self.space, seed=self.plan.seed, calibration=self.calibration
        )

    def evaluator(
        self,
        data: EvaluationData,
        directory: Path,
        training_windows: Int[Tensor, "windows length"] | None = None,
        tasks: TaskSet | None = None,
    ) -> Evaluator:
        """The evaluator of all fidelities of the case.

        Args:
            data: windows to measure on.
            directory: written by `Pruner.prepare`.
            training_windows: for light training; needed where the plan has it.
            tasks: over the same live model; needed where the plan has some.
        """
        plan, pruner = self.plan, self.pruner()
        pruner.open(directory)
        loss = plan.streamed_loss
        evaluator: Evaluator = BlockwiseEvaluator(pruner, data, loss=loss)
        if plan.training is not None:
            assert training_windows is not None
            evaluator = TrainedEvaluator(evaluator, pruner, data, plan.training, training_windows, loss=loss)
        if plan.tasks is not None:
            assert tasks is not None
            evaluator = TaskEvaluator(evaluator, pruner, tasks, plan.fidelities[-2], margin=plan.margin)
        if plan.curvature is not None:
            foretelling = Foretelling(pruner, load_curvature(directory))
            evaluator = EffectsEvaluator(
                evaluator, pruner, data, foretelling, loss="ce" if loss == "ce" else "kl"
            )
        return evaluator if plan.proxy is None else ProxyEvaluator(evaluator, pruner)


def cases_of(plan: SessionPlan) -> dict[str, SessionPlan]:
    """The plan of each case by name; the plan's own first."""
    if not plan.space.cases:
        return {MAIN: plan}
    others = {
        case.name: replace(
            plan, model=case.model or plan.model, space=plan.space.at(case), latency=None, tasks=None
        )
        for case in plan.space.cases
    }
    return {MAIN: replace(plan, space=plan.space.at(None))} | others


def in_general(cases: Mapping[str, Evaluator], space: Any) -> Evaluator:
    """The evaluators of all cases, by name, as one for the candidates of a space."""
    return next(iter(cases.values())) if len(cases) == 1 else GeneralEvaluator(cases, space.reference.text)


class GeneralEvaluator(Evaluator):
    """Measures candidates in several cases; the loss weighs them alike.

    ``loss = exp(mean over cases of log(loss of the candidate / loss of the reference in that case))``, the geometric
    mean of ratios. Losses of cases differ in scale (2:4 hurts ten times as much as 50 %, a small model more than a
    large one): in a mean of losses the hardest case would decide alone. In a mean of logs of ratios, a tenth less
    counts the same in each, and the reference's choice moves all candidates alike, so that no order depends on it.
    It is 1 for the reference and 0 for the dense model.

    The other values are those of the first case; each case's own loss is kept as ``loss:<name of the case>``. Tokens,
    seconds and blocks are sums. The reference is measured once per worker and fidelity, and not counted.

    Args:
        cases: evaluators by the name of the case.
        reference: canonical text of a candidate that every case can measure.
    """

    def __init__(self, cases: Mapping[str, Evaluator], reference: str) -> None:
        self._cases = dict(cases)
        self._reference = reference
        self._references: dict[tuple[str, Fidelity], float] = {}

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`; a candidate that is infeasible in one case is not measured in later ones.

        Raises:
            ValueError: if the reference has no loss in some case.
        """
        found: list[dict[str, Measurement]] = [{} for _ in candidates]
        for name, evaluator in self._cases.items():
            rest = [i for i, seen in enumerate(found) if all(m.infeasible is None for m in seen.values())]
            if not rest:
                break
            measured = evaluator.evaluate([candidates[i] for i in rest], fidelity)
            for i, measurement in zip(rest, measured, strict=True):
                found[i][name] = measurement
        return [self._joined(each, fidelity) for each in found]

    def _joined(self, found: Mapping[str, Measurement], fidelity: Fidelity) -> Measurement:
        measurements = list(found.values())
        case, last = list(found)[-1], measurements[-1]
        reason = None if last.infeasible is None else f"{last.infeasible} (Case {case}.)"
        return replace(
            measurements[0],
            values={} if reason else {**measurements[0].values, **self._losses(found, fidelity)},
            infeasible=reason,
            windows=(),  # of the first case's loss alone
            n_tokens=sum(m.n_tokens for m in found.values()),
            seconds=sum(m.seconds for m in found.values()),
            blocks=sum(m.blocks for m in found.values()),
            blocks_saved=sum(m.blocks_saved for m in found.values()),
        )

    def _losses(self, found: Mapping[str, Measurement], fidelity: Fidelity) -> dict[str, float]:
        """The mean, and that of each case."""
        losses = {name: max(m.values["loss"], 0.0) for name, m in found.items()}  # rounding may go below 0
        ratios = [loss / self._of_reference(name, fidelity) for name, loss in losses.items()]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if all(ratios) else 0.0
        return {"loss": mean} | {f"loss:{name}": loss for name, loss in losses.items()}

    def _of_reference(self, name: str, fidelity: Fidelity) -> float:
        key = (name, fidelity)
        if key not in self._references:
            [measured] = self._cases[name].evaluate([self._reference], fidelity)
            loss = measured.values.get("loss", 0.0)
            if loss <= 0:
                raise ValueError(
                    f"Expected a loss of {self._reference!r}, which the others are compared with, got "
                    f"{measured.infeasible or loss} in case {name}. Put another first in `space.known`."
                )
            self._references[key] = loss
        return self._references[key]
