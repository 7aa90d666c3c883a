"""Forecast of a recovery, from its run and config.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.forecast_parts import calibration_line, room_of, subject_of, with_streamed
from secateur.search.app.session import Say, plan, silent, usage_errors
from secateur.search.controller import Trial
from secateur.spaces.forecast import Forecast, Phase, Work, with_copies

if TYPE_CHECKING:
    pass


@usage_errors()
def forecast_recover(
    directory: Path,
    trials: Sequence[Trial],
    values: Mapping[str, Any],
    *,
    timing: bool = True,
    say: Say = silent,
) -> Forecast:
    """Forecast of a recovery: each trial is trained by a process of its own, one after another on one device.

    Args:
        directory: of the run.
        trials: that are trained.
        values: of the training: method, loss, tokens, lr, rank.
        timing, say: see `forecast_search`.

    Raises:
        UsageError: if the run's settings don't fit the config.
    """
    from secateur.evaluators.forecast import memory
    from secateur.evaluators.forecast.prospect import prospect
    from secateur.evaluators.forecast.speed import block_shares, measure_speed
    from secateur.evaluators.training.settings import Training
    from secateur.search.results.run import open_run

    view = open_run(directory)
    training = Training(**values)
    of = prospect(plan(view.settings, view.shape.latency), say=say)
    found, window = of.outline, of.plan.window
    worker: tuple[Phase, ...] = ("load", "prune", "train", "export")
    with found.shapes:
        pruner = of.pruner()
        streamed, kinds = pruner.streamed, tuple(pruner.gradients)
    calibration = memory.empty_tokens(of.plan.calibration_tokens, window)
    holdings = [memory.of_process(), *memory.of_weights(found, worker)]
    teacher: tuple[Phase, ...] = ("prune", "train", "export")
    holdings += memory.of_statistics(found, streamed, kinds, calibration, "prune")
    holdings += memory.of_pruned(found, ("prune", "train", "export"))
    holdings += memory.of_training(found, training, window, ("train",))
    holdings += memory.of_export(found)
    streamed_teacher = memory.of_streamed_weights(found, teacher, ()) if found.device.type == "cpu" else None
    speed = None
    if timing:
        say("timing a block of this shape")
        speed = measure_speed(found, window)
    n_tokens = len(trials) * training.tokens
    seconds = None
    if speed is not None:
        step = sum(block_shares(of.anatomy, window)) * speed.block + speed.loss
        seconds = (
            (4 if training.loss == "kl" else 3) * n_tokens * step
        )  # backward: two passes; the teacher: one
    why = f"{len(trials)} models, {training.tokens:,} tokens each, {training.method}"
    copied = [*memory.of_teacher(found, teacher), *holdings]
    whole = Forecast(
        subject=subject_of(view.settings.model, found, method=training.method),
        device=found.device.type,
        holdings=(memory.of_process(), *with_copies(copied, 1)),
        work=(Work("training", seconds, n_tokens, why, "--tokens"),),
        room=room_of(found, directory, ()),
        calibrated=calibration_line(speed),
        notes=("Loading, pruning and measuring of each model are not timed.",),
    )
    by_block = streamed_teacher and with_copies([*streamed_teacher, *holdings], 1)
    return with_streamed(whole, view.settings.stream, by_block)
