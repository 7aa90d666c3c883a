"""Setup of workers in other processes: a plain value that is sent, and the directories that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.evaluators.cases import Case, in_general
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.plan import SessionPlan
from secateur.evaluators.session import Session, set_threads
from secateur.evaluators.tasks.task_set import TaskSet
from secateur.pruners.calibration.prompts import prompt_tokens
from secateur.pruners.calibration.tokens import bos_token
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.loading import LoadedModel, mappable
from secateur.pruners.models.mapped import MappedModel
from secateur.pruners.models.memory import take_share
from secateur.pruners.models.opening import open_model
from secateur.pruners.pruner import DenseModel
from secateur.spaces.measurement import PARTS
from secateur.spaces.own_metrics import HeldMethod, held_methods, hold
from secateur.spaces.sent_modules import SentModule, install, modules_of
from secateur.spaces.shape import ModelShape

WINDOWS = "windows.safetensors"
TRAINING = "training"
"""Name of the windows of light training, beside the measured parts."""

DAMAGED = "damaged:"
"""Prefix of the damaged positions of a part, beside its windows."""

TASKS = "tasks"
"""Directory of a copy of the task files, beside the windows."""


@dataclass(frozen=True)
class WorkerSetup:
    """Sets up an evaluator with a session's model, space and data, without its texts.

    Args:
        plan: of the session.
        space: of the session.
        cases: plans of this model's cases by name, each with its space and the sizes of the model.
        threads: of torch.
        fingerprint: of the model.
        own: directories of a model whose weights are mapped as they are stored, so that the workers of a node share one
            copy; of the token windows; of the level store.
        others: setups for the cases' other models.
        held: methods that the driver has registered and workers can't import.
        modules: of metrics that the settings name by a path, for workers that do not find them.
        share: of each GPU's memory, where several workers use one.
    """

    plan: SessionPlan
    space: Any
    cases: Mapping[str, tuple[SessionPlan, Any, ModelShape]]
    threads: int
    fingerprint: str
    own: tuple[Path, Path, Path]
    others: tuple[WorkerSetup, ...] = ()
    held: tuple[HeldMethod, ...] = ()
    modules: tuple[SentModule, ...] = ()
    share: float = 1.0

    @property
    def directories(self) -> tuple[Path, ...]:
        """Directories that a worker reads: three a model."""
        return (*self.own, *chain.from_iterable(other.own for other in self.others))

    def __call__(self, directories: Sequence[Path]) -> Evaluator:
        """The evaluator.

        Args:
            directories: paths of those of the setup on this node.
        """
        set_threads(self.threads)
        take_share(self.share)
        hold(self.held)
        install(self.modules)
        found: dict[str, Evaluator] = {}
        for number, setup in enumerate((self, *self.others)):
            found |= setup.evaluators(*directories[3 * number : 3 * number + 3])
        return in_general(found, self.space)

    def evaluators(self, model: Path, windows: Path, levels: Path) -> dict[str, Evaluator]:
        """The evaluator of each case on this model, by name."""
        plan = self.plan
        loaded, anatomy = open_there(plan, model)
        tokens = load_file(windows / WINDOWS)
        damaged = {part: tokens[DAMAGED + part].bool() for part in PARTS if DAMAGED + part in tokens}
        data = EvaluationData(
            anatomy,
            {part: tokens[part] for part in PARTS if part in tokens},
            plan.fidelities,
            acceptance="acceptance" in plan.measures,
            damaged=damaged or None,
            compiled=plan.compiled,
            # One copy of the dense side of the loss for the workers of a node. Hidden, since it is no part of what is
            # staged to other nodes, where other models may have the same windows.
            shared=windows / f".dense-{self.fingerprint[:16]}",
        )
        tasks = None
        if plan.tasks is not None:
            there = replace(plan.tasks, directory=windows / TASKS)
            tasks = TaskSet(there, loaded.model, loaded.tokenizer, plan.bos)
        prompts = prompt_tokens(loaded.tokenizer)
        return {
            name: Case(plan, space, DenseModel(anatomy, self.fingerprint, shape, prompts)).evaluator(
                data, levels, tokens.get(TRAINING), tasks
            )
            for name, (plan, space, shape) in self.cases.items()
        }


def plan_there(session: Session, plan: SessionPlan, *, spread: bool, device: str | None) -> SessionPlan:
    """A plan of a session for workers, on the session's dtype; arguments as of `worker_setup`."""
    dtype = str(session.anatomy.dtype).removeprefix("torch.")
    device = "spread" if spread else device or session.plan.device
    streamed = isinstance(session.loaded, MappedModel) and device == session.plan.device
    return replace(plan, dtype=dtype, device=device, stream="always" if streamed else "never")


def weights_of(session: Session) -> Path:
    """Directory of a session's model whose weights are mapped as they are stored."""
    loaded = session.loaded
    return loaded.directory if isinstance(loaded, MappedModel) else mappable(loaded)


def open_there(plan: SessionPlan, model: Path) -> tuple[LoadedModel, Anatomy]:
    """The model of a worker's plan, from its directory on this node."""
    loaded = open_model(
        str(model),
        stream=plan.stream,
        dtype=plan.dtype,
        device=plan.device,
        trust_remote_code=plan.trust_remote_code,
    )
    bos = bos_token(loaded.tokenizer, plan.bos)
    return loaded, replace(loaded.dissect(bos), all_experts=plan.moe_all_experts)


def worker_setup(
    session: Session,
    directory: Path,
    levels: Path,
    *,
    threads: int,
    spread: bool,
    device: str | None = None,
    share: float = 1.0,
) -> WorkerSetup:
    """Write the directory that workers read, and give their setup.

    Args:
        session: the driver's.
        directory: for the windows; made if it is missing.
        levels: the level store.
        threads: of torch in a worker.
        spread: put one model on all devices that a worker sees.
        device: of the workers' models otherwise; None: the driver's.
        share: of each GPU's memory that a worker plans with.

    Raises:
        OSError: if a directory can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    windows: list[tuple[str, Tensor]] = [*session.windows.items()]
    windows += [(DAMAGED + part, chosen) for part, chosen in (session.damaged or {}).items()]
    if session.plan.training is not None:
        windows.append((TRAINING, session.training_windows()))
    save_file({name: tokens.contiguous() for name, tokens in windows}, directory / WINDOWS)
    if session.plan.tasks is not None:
        rmtree(directory / TASKS, ignore_errors=True)
        copytree(session.plan.tasks.directory, directory / TASKS)

    def there(plan: SessionPlan) -> SessionPlan:
        return plan_there(session, plan, spread=spread, device=device)

    return WorkerSetup(
        there(session.plan),
        session.space,
        {name: (there(case.plan), case.space, case.dense.shape) for name, case in session.cases.items()},
        threads,
        session.loaded.fingerprint,
        (weights_of(session), directory, levels),
        tuple(
            worker_setup(
                other,
                other.beside(directory),
                other.beside(levels),
                threads=threads,
                spread=spread,
                device=device,
            )
            for other in session.others
        ),
        held_methods(),
        modules_of(session.plan.space.method_names),
        share,
    )
