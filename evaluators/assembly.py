"""Assembly of a plan's evaluator, in the driver as in the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.plan import Plan
from secateur.evaluators.proxy import ProxyEvaluator
from secateur.evaluators.tasks.evaluator import TaskEvaluator
from secateur.evaluators.tasks.task_set import TaskSet
from secateur.evaluators.trained import TrainedEvaluator
from secateur.pruners.pruner import Calibration, DenseModel, Pruner, pruner_class


@dataclass(frozen=True)
class Case:
    """One plan that candidates are measured by on a session's model.

    Args:
        plan: of the case.
        space: of its candidates.
        dense: the live model, with the sizes that costs of the case are counted from.
        calibration: data; None in workers, which open what was prepared.
    """

    plan: Plan
    space: Any
    dense: DenseModel
    calibration: Calibration | None = None

    def pruner(self) -> Pruner:
        """A new pruner of the case."""
        settings = self.plan.space
        return pruner_class(settings)(
            settings, self.dense, space=self.space, seed=self.plan.seed, calibration=self.calibration
        )


def assemble_all(
    cases: Mapping[str, Case],
    data: EvaluationData,
    directory: Path,
    *,
    training_windows: Int[Tensor, "windows length"] | None = None,
    tasks: TaskSet | None = None,
    worker: str = "local",
) -> dict[str, Evaluator]:
    """An evaluator for each case, by name, over one dense model; see `assemble`."""
    return {
        name: assemble(case, data, directory, training_windows=training_windows, tasks=tasks, worker=worker)
        for name, case in cases.items()
    }


def assemble(
    case: Case,
    data: EvaluationData,
    directory: Path,
    *,
    training_windows: Int[Tensor, "windows length"] | None = None,
    tasks: TaskSet | None = None,
    worker: str = "local",
) -> Evaluator:
    """The evaluator that answers all fidelities of a case.

    Args:
        case: with the dense model.
        data: windows to measure on.
        directory: what `Pruner.prepare` wrote.
        training_windows: for light training; needed where the plan has it.
        tasks: over the same live model; needed where the plan has some.
        worker: the worker's name, for the record.
    """
    plan, space, anatomy = case.plan, case.space, case.dense.anatomy
    pruner = case.pruner()
    pruner.open(directory)
    evaluator: Evaluator = BlockwiseEvaluator(
        anatomy, space, pruner, data, loss=plan.loss, seed=plan.seed, worker=worker
    )
    if plan.training is not None:
        assert training_windows is not None
        evaluator = TrainedEvaluator(
            evaluator,
            anatomy,
            space,
            pruner,
            data,
            plan.training,
            training_windows,
            loss=plan.loss,
            seed=plan.seed,
            worker=worker,
        )
    if plan.tasks is not None:
        assert tasks is not None
        evaluator = TaskEvaluator(evaluator, space, pruner, tasks, plan.fidelities[-2])
    if plan.proxy is not None:
        evaluator = ProxyEvaluator(evaluator, space, pruner, seed=plan.seed, worker=worker)
    return evaluator
