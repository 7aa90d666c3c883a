"""Recovery of one candidate: pruned once more, trained in slices, and saved like an export."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from secateur.evaluators.exporting import new_manifest
from secateur.evaluators.plan import Plan
from secateur.evaluators.session import Session, set_threads
from secateur.evaluators.training.recipe import Recipe
from secateur.evaluators.training.trainer import Trainer
from secateur.evaluators.training.validation import Validation
from secateur.pruners.export.manifest import MANIFEST, Manifest, same_export
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.spaces.measurement import Fidelity

N_SLICES = 10
"""A run reports, and can be continued from, the end of each of so many equal parts."""

_STATE = "state.pt"

Say = Callable[[str], None]


def _silent(line: str) -> None:
    """Say nothing."""


def new_recipe(values: Mapping[str, Any], session: Session) -> Recipe:
    """A recipe that fits the session's windows, and that this installation can run.

    Raises:
        ValueError: if it does not.
    """
    recipe = Recipe(**values)
    recipe.n_steps(session.plan.window)
    session.training_windows()
    if recipe.method == "lora" and find_spec("peft") is None:
        raise ValueError(
            'Expected PEFT for the method lora, got none. Install it with: pip install "secateur[recover]", or '
            "choose the method full or norms."
        )
    return recipe


@dataclass(frozen=True)
class RecoveryJob:
    """What a worker needs to know; plain values only.

    Args:
        plan: of the search.
        candidate: canonical text.
        sequential: how it is pruned, see `Pruner.prune`.
        recipe: how it is trained.
        threads: that torch computes with; None leaves its choice.
    """

    plan: Plan
    candidate: str
    sequential: bool
    recipe: Recipe
    threads: int | None = None


class Recovery:
    """A pruned model in training, in slices; on the calibration part, validated on the smallest search fidelity.

    Raises:
        ValueError: if the job does not fit the model or the texts.
    """

    def __init__(self, job: RecoveryJob, say: Say = _silent) -> None:
        set_threads(job.threads)
        self._job = job
        session, dense = open_pruned(job, say)
        fidelity = session.plan.fidelities[0]
        self._validation = Validation(dense, first_windows(session, fidelity))
        self._anatomy = session.anatomy
        self._trainer = make_trainer(session, dense, job)
        self._course: list[dict[str, Any]] = []

    def step(self) -> dict[str, Any]:
        """Train one slice and validate.

        Returns:
            ``loss`` (the study's), ``kl`` and ``ce`` on the validation windows, ``training_loss``, ``trained_tokens``,
            ``tokens`` in all, whether it is ``done``, the ``course`` so far; if it diverged, the reason as
            ``failure``, with an infinite ``loss``.
        """
        trainer, tokens = self._trainer, self._job.recipe.tokens
        if not self._course:
            self._note(None)
        training_loss = trainer.train(math.ceil(trainer.n_steps / N_SLICES))
        if trainer.failure is None:
            self._note(training_loss)
        losses = self._course[-1] if trainer.failure is None else {"kl": math.inf, "ce": math.inf}
        failure = trainer.failure or _overflow(losses)
        values = {"loss": losses[self._job.plan.loss], "kl": losses["kl"], "ce": losses["ce"]}
        ends = {"done": trainer.step == trainer.n_steps or failure is not None, "failure": failure}
        return {**values, "trained_tokens": trainer.trained_tokens, "tokens": tokens, **ends} | {
            "course": list(self._course)
        }

    def _note(self, training_loss: float | None) -> None:
        losses = self._validation.losses(self._anatomy)
        tokens = self._trainer.trained_tokens
        self._course.append({"trained_tokens": tokens, "training_loss": training_loss, **losses})

    def save(self, directory: Path) -> None:
        """Keep everything that `load` continues from."""
        torch.save({"trainer": self._trainer.state_dict(), "course": self._course}, directory / _STATE)

    def load(self, directory: Path) -> None:
        """Continue from what `save` kept, in any process."""
        state = torch.load(directory / _STATE, weights_only=True, map_location="cpu")
        self._trainer.load_state_dict(state["trainer"])
        self._course = state["course"]


@dataclass(frozen=True)
class RecoveredModel:
    """A recovered model on the disk.

    Args:
        measured: ``kl`` and ``ce`` in nats per token by what they were measured on, before and after.
        values: of the measurement: ``loss``, ``kl``, ``ce`` on the test windows, costs, ``trained_tokens``.
        label: what to expect of it.
    """

    measured: Mapping[str, Mapping[str, float]]
    values: Mapping[str, float]
    label: str


def export_recovered(
    job: RecoveryJob, state: Path, to: Path, *, seeds: Mapping[str, int], say: Say = _silent
) -> RecoveredModel:
    """Measure a trained model in the precision in which it is stored, and save it with the checks of an export.

    Args:
        job: that was trained.
        state: directory that `Recovery.save` wrote last.
        to: new or empty directory, or one that holds this model already, which is then left alone.
        seeds: for the record, by what they are for.
        say: told in one line what is being done.

    Raises:
        ValueError: if `to` is not empty.
        ExportError: if the model can't be written, or does not load as it should.
    """
    set_threads(job.threads)
    session, dense = open_pruned(job, say)
    manifest = _manifest(session, job, seeds)
    if same_export(to, manifest):
        return _recovered(session, job, Manifest.from_json((to / MANIFEST).read_text(encoding="utf-8")))
    fidelities = session.plan.final_fidelities
    on = {fidelity.text: Validation(dense, first_windows(session, fidelity)) for fidelity in fidelities}
    measured = {_before(text): validation.losses(session.anatomy) for text, validation in on.items()}
    dtype = session.anatomy.head.weight.dtype
    trainer = make_trainer(session, dense, job)
    trainer.load_state_dict(torch.load(state / _STATE, weights_only=True, map_location="cpu")["trainer"])
    trainer.finish()
    for parameter in session.loaded.model.parameters():
        parameter.data = parameter.data.to(session.loaded.stored_dtype).to(dtype)
    measured |= {_after(text): validation.losses(session.anatomy) for text, validation in on.items()}
    say("writing, and loading it again in a fresh process")
    manifest = replace(manifest, measured=measured)
    config = session.config(job.candidate)
    manifest = session.pruner.save(session.loaded, config, to, manifest, session.data().check_tokens).manifest
    return _recovered(session, job, manifest)


def open_pruned(job: RecoveryJob, say: Say) -> tuple[Session, Anatomy]:
    """A session whose model is pruned, and the dense model with weights of its own."""
    session = Session(job.plan, say)
    dense = dissect(copy.deepcopy(session.loaded.model))
    say("pruning")
    session.pruner.prune(session.config(job.candidate), sequential=job.sequential)
    return session, dense


def make_trainer(session: Session, dense: Anatomy, job: RecoveryJob) -> Trainer:
    """A trainer of the session's model on its calibration part."""
    return Trainer(session.anatomy, job.recipe, session.training_windows(), dense)


def first_windows(session: Session, fidelity: Fidelity) -> torch.Tensor:
    """The windows of a fidelity."""
    return session.windows[fidelity.part][: fidelity.n_tokens // session.plan.window]


def _manifest(session: Session, job: RecoveryJob, seeds: Mapping[str, int]) -> Manifest:
    return new_manifest(
        session.pruner,
        session.loaded,
        job.candidate,
        session.config(job.candidate),
        sequential=job.sequential,
        seeds=seeds,
        recovery=job.recipe.text,
        recovery_text_tokens=session.training_windows().numel(),
    )


def _recovered(session: Session, job: RecoveryJob, manifest: Manifest) -> RecoveredModel:
    losses = manifest.measured[_after(session.plan.final_fidelities[-1].text)]
    costs = session.pruner.cost(session.space.parse(job.candidate))
    values = {
        "loss": losses[session.plan.loss],
        **losses,
        **costs,
        "trained_tokens": float(job.recipe.tokens),
    }
    return RecoveredModel(manifest.measured, values, manifest.label)


def _before(fidelity: str) -> str:
    return f"{fidelity}, before recovery"


def _after(fidelity: str) -> str:
    return f"{fidelity}, as recovered"


def _overflow(losses: Mapping[str, float]) -> str | None:
    finite = math.isfinite(losses["kl"]) and math.isfinite(losses["ce"])
    return None if finite else "training diverged: its validation loss is not finite"
