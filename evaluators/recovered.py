"""Export of a recovered model: measured as it is stored, before and after the training, and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from secateur.evaluators.data.windows import losses_on
from secateur.evaluators.exporting import new_manifest
from secateur.evaluators.losses import minimised
from secateur.evaluators.recovery import STATE, RecoveryJob, Say, make_trainer, open_pruned
from secateur.evaluators.session import Session, set_threads
from secateur.evaluators.tasks.task_set import task_values
from secateur.pruners.export.manifest import Manifest, same_export
from secateur.pruners.export.saving import remove_leftovers
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.pruner import Config

RECOVERED = "as recovered"
"""Name of measurements of the trained model, behind their fidelity."""

Measured = Mapping[str, Mapping[str, float]]


def export_recovered(
    job: RecoveryJob,
    state: Path,
    to: Path,
    *,
    seeds: Mapping[str, int],
    say: Say = lambda line: None,
) -> tuple[Measured, dict[str, float]]:
    """Measure a trained model in the precision in which it is stored, and save it with the checks of an export.

    Args:
        job: that was trained.
        state: last directory written by `Recovery.save`.
        to: new or empty directory, or one that holds this model already, which is then left alone.
        seeds: for the record, by their use.
        say: given progress, one line at a time.

    Returns:
        Means of the losses by fidelity, before and after; and the values of the measurement: ``loss`` and these means
        on the test windows, costs, ``trained_tokens``.

    Raises:
        ValueError: if `to` is not empty, or holds this model with a damaged file.
        ExportError: if the model can't be written, or does not load as it should.
    """
    set_threads(job.threads)
    session, dense = open_pruned(job, say)
    config = session.config(job.candidate)
    manifest = _manifest(job, session, config, seeds)
    for path in remove_leftovers(to):
        say(f"removed {path}, left by a killed export")
    if there := same_export(to, manifest):
        manifest = there
    else:
        manifest = replace(manifest, measured=_measured(job, session, dense, state))
        say("writing, and loading it again in a fresh process")
        check_tokens = session.data().check_tokens
        manifest = session.pruner.save(session.loaded, config, to, manifest, check_tokens).manifest
    losses = manifest.measured[f"{session.plan.final_fidelities[-1].text}, {RECOVERED}"]
    costs = session.pruner.cost(session.space.parse(job.candidate))
    loss = losses["loss"] if session.plan.margin is not None else minimised(session.plan.loss, losses)
    values = {"loss": loss, **losses, **costs}
    return manifest.measured, {**values, "trained_tokens": float(job.training.tokens)}


def _manifest(job: RecoveryJob, session: Session, config: Config, seeds: Mapping[str, int]) -> Manifest:
    """Record of the export, without measurements."""
    plan = session.plan
    return new_manifest(
        session.pruner,
        session.loaded,
        job.candidate,
        config,
        sequential=job.sequential,
        seeds=seeds,
        texts={"search": plan.search, "test": plan.test},
        recovery=job.training.text,
        recovery_text_tokens=session.training_windows().numel(),
    )


def _measured(job: RecoveryJob, session: Session, dense: Anatomy, state: Path) -> dict[str, dict[str, float]]:
    """Means of the losses by fidelity, of the pruned model and of the trained one, which the session has then."""
    plan, anatomy = session.plan, session.anatomy
    on = {fidelity.text: job.batches(dense, session, fidelity) for fidelity in plan.final_fidelities}
    measured = {f"{text}, before recovery": losses_on(anatomy, batches) for text, batches in on.items()}
    _take_trained(job, session, dense, state)
    measured |= {f"{text}, {RECOVERED}": losses_on(anatomy, batches) for text, batches in on.items()}
    if plan.margin is not None and session.task_set is not None:
        found = session.task_set.measure(session.task_set.held_out())
        margin_loss = {"loss": found[plan.margin].margin_loss}
        measured[f"{plan.final_fidelities[-1].text}, {RECOVERED}"] |= task_values(found) | margin_loss
    return measured


def _take_trained(job: RecoveryJob, session: Session, dense: Anatomy, state: Path) -> None:
    """Give the session's model the trained weights, in the precision in which they are stored."""
    dtype = session.anatomy.head.weight.dtype
    trainer = make_trainer(session, dense, job)
    trainer.load_state_dict(torch.load(state / STATE, weights_only=True, map_location="cpu")["trainer"])
    trainer.finish()
    for parameter in session.loaded.model.parameters():
        parameter.data = parameter.data.to(session.loaded.stored_dtype).to(dtype)
