"""Puts the evaluator of a plan together: in the driver and in the workers the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.proxy import ProxyEvaluator
from secateur.evaluators.tasks.evaluator import TaskEvaluator
from secateur.evaluators.tasks.task_set import TaskSet
from secateur.evaluators.trained import TrainedEvaluator
from secateur.pruners.models.anatomy import Anatomy

if TYPE_CHECKING:
    from secateur.evaluators.plan import Plan


def assemble_all(
    cases: Mapping[str, tuple[Plan, Any]],
    anatomy: Anatomy,
    data: EvaluationData,
    directory: Path,
    *,
    training_windows: Int[Tensor, "windows length"] | None = None,
    tasks: TaskSet | None = None,
    worker: str = "local",
) -> dict[str, Evaluator]:
    """An evaluator for each plan with its space, by name, over one dense model; see `assemble`."""
    return {
        name: assemble(
            plan,
            space,
            anatomy,
            data,
            directory,
            training_windows=training_windows,
            tasks=tasks,
            worker=worker,
        )
        for name, (plan, space) in cases.items()
    }


def assemble(
    plan: Plan,
    space: Any,
    anatomy: Anatomy,
    data: EvaluationData,
    directory: Path,
    *,
    training_windows: Int[Tensor, "windows length"] | None = None,
    tasks: TaskSet | None = None,
    worker: str = "local",
) -> Evaluator:
    """The evaluator that answers all fidelities of the plan.

    Args:
        plan: what was set up.
        space: of the candidates.
        anatomy: the dense model.
        data: what is measured on.
        directory: what the rig has built.
        training_windows: what light training is on; needed where the plan has one.
        tasks: over the same live model; needed where the plan has some.
        worker: the worker's name, for the record.
    """
    switcher = plan.rig.switcher(plan, space, anatomy, directory)
    evaluator: Evaluator = BlockwiseEvaluator(
        anatomy, space, switcher, data, loss=plan.loss, seed=plan.seed, worker=worker
    )
    if plan.training is not None:
        assert training_windows is not None
        evaluator = TrainedEvaluator(
            evaluator,
            anatomy,
            space,
            switcher,
            data,
            plan.training,
            training_windows,
            loss=plan.loss,
            seed=plan.seed,
            worker=worker,
        )
    if plan.tasks is not None:
        assert tasks is not None
        evaluator = TaskEvaluator(evaluator, space, switcher, tasks, plan.fidelities[-2])
    if plan.proxy is not None:
        assert plan.rig.proxy is not None, "settings of its space have a proxy"
        proxy = plan.rig.proxy(plan, space, anatomy, directory)
        evaluator = ProxyEvaluator(evaluator, space, proxy, seed=plan.seed, worker=worker)
    return evaluator
