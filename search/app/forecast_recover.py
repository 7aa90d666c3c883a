"""Forecast of a recovery, from its run and config.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.forecast_parts import calibration_line, room_of, speed_of, subject_of, with_streamed
from secateur.search.app.session import Say, plan, silent, usage_errors
from secateur.search.controller import Trial
from secateur.spaces.forecast import Forecast, Holding, Phase, Work, with_copies
from secateur.spaces.measurement import Part

if TYPE_CHECKING:
    from secateur.evaluators.forecast.prospect import Prospect
    from secateur.evaluators.training.settings import Training

WORKER: tuple[Phase, ...] = ("prune", "train")
"""Phases of the process that trains; the driver loads before, and exports after."""


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

    The driver then measures and writes each.

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
    from secateur.evaluators.forecast.speed import block_shares
    from secateur.evaluators.forecast.training import of_teacher
    from secateur.evaluators.training.settings import Training
    from secateur.search.results.run import open_run

    view = open_run(directory)
    training = Training(**values)
    of = prospect(plan(view.settings, view.shape.latency), say=say)
    found, window = of.outline, of.plan.window
    parts = _Parts(of, training, len(trials))
    speed = speed_of(found, window, say, trains=True) if timing else None
    n_tokens = len(trials) * training.tokens
    seconds = None
    if speed is not None:
        stack = sum(block_shares(of.anatomy, window))
        seconds = n_tokens * speed.training(stack, teacher=training.loss == "kl")
    why = f"{len(trials)} models, {training.tokens:,} tokens each, {training.method}"
    whole = Forecast(
        subject=subject_of(view.settings.model, found, method=training.method),
        device=found.device.type,
        holdings=(memory.of_process(), *parts.beside(partial(of_teacher, found))),
        work=(Work("training", seconds, n_tokens, why, "--tokens"),),
        room=room_of(found, directory, ()),
        calibrated=calibration_line(speed),
        notes=("Loading, pruning and measuring of each model are not timed.",),
    )
    by_block = None
    if found.device.type == "cpu":
        by_block = parts.beside(partial(memory.of_streamed_weights, found, working=()))
    return with_streamed(whole, view.settings.stream, by_block)


class _Parts:
    """Holdings of a recovery besides the teacher: the worker while it trains, the driver before and after."""

    def __init__(self, of: Prospect, training: Training, n_models: int) -> None:
        from secateur.evaluators.forecast import memory
        from secateur.evaluators.forecast.training import of_training

        found, window = of.outline, of.plan.window
        with found.shapes:
            pruner = of.pruner()
            streamed, kinds = pruner.streamed, tuple(pruner.gradients)
        calibration = memory.empty_tokens(of.plan.calibration_tokens, window)
        in_worker = [
            memory.of_process(),
            *memory.of_weights(found, WORKER),
            *memory.of_statistics(found, streamed, kinds, calibration, "prune"),
            *memory.of_pruned(found, WORKER),
            *of_training(found, training, window, ("train",)),
        ]
        sizes: dict[Part, int] = {f.part: f.n_tokens for f in of.plan.final_fidelities}
        trained = of_training(found, training, window, ("export",))
        self._holdings = [
            *with_copies(in_worker, 1),
            *memory.of_weights(found, ("load", "export")),
            *memory.of_pruned(found, ("export",)),
            *memory.of_data(found, window, sizes, dict.fromkeys(sizes, ("export",))),
            *(x for x in trained if not x.name.startswith("activations")),
            *memory.of_export(found, n_models=n_models),
        ]

    def beside(self, teacher: Callable[[Sequence[Phase]], list[Holding]]) -> list[Holding]:
        """All of it with a teacher, of which worker and driver have one each."""
        return [*with_copies(teacher(WORKER), 1), *teacher(("export",)), *self._holdings]
