"""One candidate on several models, sparsities and patterns: what is good in general, not by luck."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.plan import Plan
from secateur.spaces.measurement import Fidelity, Measurement

MAIN = "main"
"""The case that a plan itself describes."""


def cases_of(plan: Plan) -> dict[str, Plan]:
    """The plan of each model, sparsity and pattern that candidates are measured at, by name; the plan's own first."""
    if not plan.space.cases:
        return {MAIN: plan}
    own = replace(plan, space=plan.space.at(None))
    others = {
        case.name: replace(
            plan, model=case.model or plan.model, space=plan.space.at(case), latency=None, tasks=None
        )
        for case in plan.space.cases
    }
    return {MAIN: own} | others


def loss_name(case: str) -> str:
    """The name of a case's own loss among the values of a measurement."""
    return f"loss:{case}"


def in_general(cases: Mapping[str, Evaluator], space: Any) -> Evaluator:
    """The evaluators of all cases as one; of a single case its own.

    Args:
        cases: by the name of the case.
        space: of the candidates.
    """
    return next(iter(cases.values())) if len(cases) == 1 else GeneralEvaluator(cases, space.reference.text)


class GeneralEvaluator(Evaluator):
    """Measures candidates in several cases; the loss weighs them alike.

    ``loss = exp(mean over cases of log(loss of the candidate / loss of the reference in that case))``, the geometric
    mean of ratios. Losses of cases differ in scale (2:4 hurts ten times as much as 50 %, a small model more than a
    large one): in a mean of losses the hardest case would decide alone. In a mean of logs of ratios, a tenth less
    counts the same in each, and the reference's choice moves all candidates alike, so that no order depends on it.
    It is 1 for the reference and 0 for the dense model.

    The other values are those of the first case; each case's own loss is kept as ``loss:<name of the case>``. Tokens,
    seconds and blocks are sums. The reference is measured once a worker and fidelity, and not counted.

    Args:
        cases: evaluators by the name of the case.
        reference: canonical text of a candidate that every case can measure.
    """

    def __init__(self, cases: Mapping[str, Evaluator], reference: str) -> None:
        self._cases = dict(cases)
        self._reference = reference
        self._references: dict[tuple[str, Fidelity], float] = {}

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`; what is infeasible in one case is not measured in those after it.

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
        return {"loss": mean} | {loss_name(name): loss for name, loss in losses.items()}

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
