"""Recovery of one candidate: pruned again, trained in slices, and saved like an export."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.evaluators.damaged import Damaged
from secateur.evaluators.data.windows import losses_on, teacher_batches
from secateur.evaluators.losses import Teacher, minimised
from secateur.evaluators.plan import SessionPlan
from secateur.evaluators.session import Session, set_threads
from secateur.evaluators.training.paser import choose_windows
from secateur.evaluators.training.settings import Training
from secateur.evaluators.training.trainer import Trainer
from secateur.pruners.depth.merge_targets import blocks_beside_dropped
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.mapped import NotStreamedError, load_mapped
from secateur.pruners.models.opening import refuse
from secateur.spaces.measurement import Fidelity
from secateur.spaces.streaming import Stream

N_SLICES = 10
"""Equal parts of a run; it reports at the end of each, and can be continued from there."""

STATE = "state.pt"
"""File of a saved training in its directory."""

Say = Callable[[str], None]


def new_training(values: Mapping[str, Any], session: Session) -> Training:
    """Settings of a training on the session's windows with the packages of this installation.

    Raises:
        ValueError: if they do not fit.
    """
    training = Training(**values)
    training.n_steps(session.plan.window)
    session.training_windows()
    if training.method == "lora" and find_spec("peft") is None:
        raise ValueError(
            'Expected PEFT for the method lora, got none. Install it with: pip install "secateur[recover]", or '
            "choose the method full or norms."
        )
    return training


def check_dropped(training: Training, session: Session, candidate: str) -> None:
    """Check that a candidate drops whole blocks, by its record, if the method trains those beside them.

    A recipe of structure says only when it is planned whether whole blocks go: training refuses it then.

    Args:
        training: settings.
        session: of the search.
        candidate: canonical text.

    Raises:
        ValueError: if it drops none.
    """
    if training.method != "merged":
        return
    kept = session.pruner.asked(session.config(candidate)).get("kept")
    all_stay = kept is not None and all(row["kv_groups"] or row["ffn"] for row in kept)
    if all_stay or not session.pruner.is_smaller(session.pruner.settings):
        raise ValueError(
            f"Expected a candidate that drops whole blocks for the method merged, got {candidate[:80]!r}. Choose "
            "another method, or another trial."
        )


@dataclass(frozen=True)
class RecoveryJob:
    """Plain values that determine the recovery of one candidate.

    Args:
        plan: of the search.
        candidate: canonical text.
        sequential: statistics, see `Pruner.prune`.
        training: settings.
        threads: of torch; None: its default.
        damaged: positions of each part that ``weighted_kl`` is measured at; None: it is not measured.
        teacher: word of `STREAM`: the dense model is mapped from its files.
    """

    plan: SessionPlan
    candidate: str
    sequential: bool
    training: Training
    threads: int | None = None
    damaged: Damaged | None = None
    teacher: Stream = "never"

    def batches(self, dense: Anatomy, session: Session, fidelity: Fidelity) -> list[tuple[Tensor, Teacher]]:
        """Windows of a fidelity with the dense model's side, for `losses_on`."""
        damaged = None if self.damaged is None else self.damaged[fidelity.part]
        return teacher_batches(
            dense,
            first_windows(session, fidelity),
            acceptance="acceptance" in self.plan.measures,
            damaged=damaged,
        )


class Recovery:
    """A pruned model in training, in slices; on the calibration part, validated on the smallest search fidelity.

    Raises:
        ValueError: if the job does not fit the model or the texts.
    """

    def __init__(self, job: RecoveryJob, say: Say = lambda line: None) -> None:
        set_threads(job.threads)
        self._job = job
        session, dense = open_pruned(job, say)
        self._validation = job.batches(dense, session, session.plan.fidelities[0])
        self._anatomy = session.anatomy
        self._trainer = make_trainer(session, dense, job)
        self._course: list[dict[str, Any]] = []

    def step(self) -> dict[str, Any]:
        """Train one slice and validate.

        Returns:
            ``loss`` (the study's, or ``kl`` if that is a task's margin), ``kl`` and ``ce`` on the validation windows,
            ``training_loss``, ``trained_tokens``, ``tokens`` in all, whether it is ``done``, the ``course`` so far; if
            it diverged, the reason as ``failure``, with an infinite ``loss``.
        """
        trainer = self._trainer
        if not self._course:
            self._note(None)
        training_loss = trainer.train(math.ceil(trainer.n_steps / N_SLICES))
        failure, losses, loss = trainer.failure, {"kl": math.inf, "ce": math.inf}, math.inf
        if failure is None:
            losses = self._note(training_loss)
            loss = minimised(self._job.plan.streamed_loss, losses)
            if not (math.isfinite(losses["kl"]) and math.isfinite(losses["ce"])):
                failure = "training diverged: its validation loss is not finite"
        return {
            "loss": loss,
            "kl": losses["kl"],
            "ce": losses["ce"],
            "trained_tokens": trainer.trained_tokens,
            "tokens": self._job.training.tokens,
            "done": trainer.step == trainer.n_steps or failure is not None,
            "failure": failure,
            "course": list(self._course),
        }

    def _note(self, training_loss: float | None) -> dict[str, float]:
        losses = losses_on(self._anatomy, self._validation)
        tokens = self._trainer.trained_tokens
        self._course.append({"trained_tokens": tokens, "training_loss": training_loss, **losses})
        return losses

    def save(self, directory: Path) -> None:
        """Write the state that `load` reads."""
        torch.save({"trainer": self._trainer.state_dict(), "course": self._course}, directory / STATE)

    def load(self, directory: Path) -> None:
        """Continue from a saved state, in any process."""
        state = torch.load(directory / STATE, weights_only=True, map_location="cpu")
        self._trainer.load_state_dict(state["trainer"])
        self._course = state["course"]


def open_pruned(job: RecoveryJob, say: Say) -> tuple[Session, Anatomy]:
    """A session with its model pruned, and the dense model with weights of its own."""
    session = Session(job.plan, say)
    dense = _teacher(job, session, say)
    say("pruning")
    session.pruner.prune(session.config(job.candidate), sequential=job.sequential)
    return session, dense


def _teacher(job: RecoveryJob, session: Session, say: Say) -> Anatomy:
    """The dense model with weights of its own: mapped from its files where it is streamed, else copied."""
    if job.teacher != "never":
        loaded, of = session.loaded, session.plan
        try:
            mapped = load_mapped(
                loaded.name,
                dtype=of.dtype,
                device=of.device,
                trust_remote_code=of.trust_remote_code,
                say=say,
                only_large=job.teacher == "auto",
            )
            if mapped is not None:
                return mapped.dissect()
        except NotStreamedError as error:
            refuse(job.teacher, error, say)
    return dissect(copy.deepcopy(session.loaded.model))


def make_trainer(session: Session, dense: Anatomy, job: RecoveryJob) -> Trainer:
    """A trainer of the session's model on its calibration part, or on what is chosen from it."""
    windows, of = session.training_windows(), job.training
    if of.data == "paser":
        texts = session.loaded.tokenizer.batch_decode(windows, skip_special_tokens=True)
        windows = choose_windows(dense, session.anatomy, windows, of.share, texts, of.seed)
    merged = session.pruner.merges(session.config(job.candidate))
    beside_dropped = blocks_beside_dropped(session.anatomy, merged=merged)
    return Trainer(session.anatomy, of, windows, dense, beside_dropped=beside_dropped)


def first_windows(session: Session, fidelity: Fidelity) -> torch.Tensor:
    """The windows of a fidelity."""
    return session.windows[fidelity.part][: fidelity.n_tokens // session.plan.window]
