"""Recovery of picked models: longer training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import Say, is_sequential, reopen_session, silent, usage_errors
from secateur.search.controller import Trial
from secateur.search.results.run import open_run
from secateur.search.study.study import Study
from secateur.spaces.streaming import Stream

if TYPE_CHECKING:
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
    from secateur.evaluators.recovery import (
        Recovery,
        RecoveryJob,
        check_dropped,
        export_recovered,
        new_training,
    )
    from secateur.pruners.models.checkpoints.cache import cache_root
    from secateur.search.recovery.own_training import claim
    from secateur.search.recovery.stage import Stage
    from secateur.search.recovery.tuning import ray_started, train_all

    view = open_run(directory)
    of, session = view.settings, reopen_session(view, say)
    with usage_errors():
        training = new_training(settings.training, session)
        session.open_damaged(directory)
        picked = view.as_searched(trials)
        for trial in picked:
            check_dropped(training, session, trial.measurement.candidate)
    targets = {session.space.target_of(session.space.parse(t.measurement.candidate)) for t in picked}
    plan, sequential, threads = session.plan, is_sequential(of), of.executor.threads
    jobs = {
        trial.number: RecoveryJob(
            plan, trial.measurement.candidate, sequential, training, threads, session.damaged, stream
        )
        for trial in picked
    }
    seeds = {"evaluator": plan.seed, "search": of.seed}
    del session  # the workers have their own

    with Study.open_or_create(directory, view.study.settings, view.study.about) as study:
        stage = Stage(study, picked, training.to_json(), of.evaluator.test_tokens)

        def train(numbers: Sequence[int]) -> Mapping[int, Any]:
            claim(stage.experiment, cache_root() / "training")
            say("starting Ray")
            with ray_started(settings.address):
                return train_all(
                    {number: partial(Recovery, jobs[number]) for number in numbers},
                    stage.experiment,
                    competing=len(numbers) > 1 == len(targets),
                    use_gpu=of.device != "cpu",
                    say=say,
                )

        return stage.run(
            train, lambda number, state, to: export_recovered(jobs[number], state, to, seeds=seeds, say=say)
        )
