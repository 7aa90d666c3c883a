"""Recovery of picked models: longer training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import Say, is_sequential, reopen_session, silent, usage_errors
from secateur.search.controller import Trial
from secateur.search.results.run import Run, open_run
from secateur.search.study.study import Study
from secateur.spaces.streaming import Stream

if TYPE_CHECKING:
    from secateur.evaluators.plan import SessionPlan
    from secateur.evaluators.recovery import RecoveryJob
    from secateur.evaluators.training.settings import Training
    from secateur.search.recovery.stage import Recovered, RecoverySettings


def recover(
    directory: Path,
    trials: Sequence[Trial],
    settings: RecoverySettings,
    *,
    stream: Stream = "auto",
    say: Say = silent,
) -> list[Recovered]:
    """Train the models of trials for longer, one Ray Tune run each, and add them to the study as ``recovered``.

    The same call continues one that was stopped or killed. Trials of the same target compete: the worse ones are
    ended early. The text is the calibration part; validation is on the search part, the result on the test part.

    Args:
        directory: of the run.
        trials: of its study.
        settings: of the training.
        stream: the teacher, see `open_model`.
        say: given progress, one line at a time.

    Raises:
        UsageError: if Ray or PEFT is not installed, the run's model or data have changed, somebody is writing the
            run, a trial was recovered by other settings with as many tokens, or a training that was not begun here
            waits to be continued.
    """
    from secateur.evaluators.recovered import export_recovered
    from secateur.search.recovery.stage import Stage

    view = open_run(directory)
    picked = view.as_searched(trials)
    asked = _asked(view, picked, settings, stream, say)
    seeds = {"evaluator": asked.plan.seed, "search": view.settings.seed}
    with Study.open_or_create(directory, view.study.settings, view.study.about) as study:
        stage = Stage(study, picked, asked.training.to_json(), view.settings.evaluator.test_tokens)
        return stage.run(
            partial(_train, asked, stage.experiment, settings.address, say),
            lambda number, state, to: export_recovered(asked.jobs[number], state, to, seeds=seeds, say=say),
        )


@dataclass(frozen=True)
class _Asked:
    """Trainings that are asked for.

    Args:
        jobs: by the number of the trial.
        plan: of the search.
        training: settings of them all.
        n_targets: targets of the trials.
        use_gpu: train on GPUs.
    """

    jobs: Mapping[int, RecoveryJob]
    plan: SessionPlan
    training: Training
    n_targets: int
    use_gpu: bool


def _asked(
    view: Run, picked: Sequence[Trial], settings: RecoverySettings, stream: Stream, say: Say
) -> _Asked:
    """The trainings of trials, checked against the run's session, which is closed again: workers have their own.

    Raises:
        UsageError: see `recover`.
    """
    from secateur.evaluators.recovery import RecoveryJob, check_dropped, new_training

    of, session = view.settings, reopen_session(view, say)
    candidates = {trial.number: trial.measurement.candidate for trial in picked}
    with usage_errors():
        training = new_training(settings.training, session)
        session.open_damaged(view.study.directory)
        for candidate in candidates.values():
            check_dropped(training, session, candidate)
    plan, sequential, threads = session.plan, is_sequential(of), of.executor.threads
    jobs = {
        number: RecoveryJob(plan, candidate, sequential, training, threads, session.damaged, stream)
        for number, candidate in candidates.items()
    }
    targets = {session.space.target_of(session.space.parse(x)) for x in candidates.values()}
    return _Asked(jobs, plan, training, len(targets), of.device != "cpu")


def _train(
    asked: _Asked, experiment: Path, address: str | None, say: Say, numbers: Sequence[int]
) -> Mapping[int, Any]:
    """States of the trials with these numbers, trained by Ray Tune."""
    from secateur.evaluators.recovery import Recovery
    from secateur.pruners.models.checkpoints.cache import cache_root
    from secateur.search.recovery.own_training import claim
    from secateur.search.recovery.tuning import ray_started, train_all

    claim(experiment, cache_root() / "training")
    say("starting Ray")
    with ray_started(address):
        return train_all(
            {number: partial(Recovery, asked.jobs[number]) for number in numbers},
            experiment,
            competing=len(numbers) > 1 == asked.n_targets,
            use_gpu=asked.use_gpu,
            say=say,
        )
