"""Forecast of a search, from its settings and config.json alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.search.app.forecast_parts import calibration_line, room_of, speed_of, subject_of, with_streamed
from secateur.search.app.forecast_work import SearchWork
from secateur.search.app.level_building import spread_over_workers
from secateur.search.app.session import Say, on_driver, plan, silent, usage_errors
from secateur.search.executors.registry import EXECUTORS
from secateur.search.settings.settings import Settings
from secateur.spaces.forecast import Forecast, Holding, Phase, with_copies
from secateur.spaces.measurement import Part

if TYPE_CHECKING:
    from secateur.evaluators.forecast.prospect import Outline, Prospect
    from secateur.evaluators.forecast.speed import Speed

MEASURED: tuple[Phase, ...] = ("search", "test")
"""Phases in which candidates are measured."""

DRIVER: tuple[Phase, ...] = ("load", "prepare", *MEASURED)
"""Phases in which the driver holds the model."""


@usage_errors()
def forecast_search(
    settings: Settings,
    directory: Path,
    *,
    devices: Sequence[tuple[str, int | None]] = (),
    timing: bool = True,
    say: Say = silent,
) -> Forecast:
    """Forecast of a search.

    Args:
        settings: of the search.
        directory: of the run; nothing is written there.
        devices: that are only thought of, see `parse_devices`; none: the settings' own.
        timing: time a block of this shape on this machine.
        say: given progress, one line at a time.

    Raises:
        UsageError: if the search would be refused by the config alone.
    """
    from secateur.evaluators.forecast import memory
    from secateur.evaluators.forecast.prospect import prospect
    from secateur.evaluators.session import set_threads

    set_threads(settings.executor.threads)
    planned, planned_bytes = devices[0] if devices else (None, None)
    settings = settings if devices else on_driver(settings)
    of = prospect(plan(settings), planned=planned, planned_bytes=planned_bytes, say=say)
    n_workers = 1 if EXECUTORS[settings.executor.kind].in_process else _n_workers(settings)
    spread = of.pruner().independent_blocks and spread_over_workers(settings, of)
    work = SearchWork(settings, of, n_workers, n_workers if spread else 1)
    weights = memory.of_weights(of.outline, DRIVER)
    holdings = [*_of_statistics(work), *_of_candidates(work)]
    by_block = memory.of_streamed_weights(of.outline, DRIVER, ("prepare",)) if may_stream(of) else None
    speed = None
    if timing and not planned:
        speed = speed_of(of.outline, of.plan.window, say, of.plan, trains=work.trains)
    kinds = {"space": settings.space.kind, "controller": settings.controller.kind}
    whole = Forecast(
        subject=subject_of(settings.model, of.outline, **kinds),
        device=of.outline.device.type,
        holdings=(memory.of_process(), *weights, *holdings),
        work=tuple(work.steps(speed)),
        room=room_of(of.outline, directory, devices),
        calibrated=calibration_line(speed),
        notes=tuple(_notes(work, speed)),
    )
    return with_streamed(whole, settings.stream, by_block and (*by_block, *holdings))


def _of_statistics(work: SearchWork) -> list[Holding]:
    """Holdings while statistics are collected and levels built: those of activations in each process that does so."""
    from secateur.evaluators.forecast import memory

    of = work.of
    with of.outline.shapes:
        pruner = of.pruner()
        streamed, kinds = pruner.streamed, tuple(pruner.gradients)
    tokens = memory.empty_tokens(of.plan.calibration_tokens, of.plan.window)
    found = memory.of_statistics(of.outline, streamed, (), tokens, "prepare")
    found += memory.of_kept_states(of.outline, streamed, tokens, "prepare")
    if work.n_builders > 1:
        found = _in_each(found, of.outline, work.n_builders, "prepare")
    return found + memory.of_statistics(of.outline, {}, kinds, tokens, "prepare")


def _of_candidates(work: SearchWork) -> list[Holding]:
    """Holdings while candidates are measured: the store, and those of each process that measures."""
    from secateur.evaluators.forecast import memory, training

    of, in_process = work.of, EXECUTORS[work.settings.executor.kind].in_process
    phases: Mapping[Part, Sequence[Phase]] = {"search": MEASURED, "test": ("test",)}
    held = memory.of_data(of.outline, of.plan.window, work.sizes, phases, shared=not in_process)
    worked = work.shared
    with of.outline.shapes:
        pruner = of.pruner()
        store = memory.of_store(pruner, MEASURED)
        held += memory.of_levels(pruner, MEASURED)
        held += memory.of_candidates(pruner, worked and worked.state_bytes, MEASURED)
    if of.plan.training is not None:
        held += training.of_training(of.outline, of.plan.training, of.plan.window, MEASURED)
    return store + (held if in_process else _in_each(held, of.outline, work.n_workers, *MEASURED))


def may_stream(of: Prospect) -> bool:
    """True if the model of a search can be streamed, as far as its config says."""
    from secateur.evaluators.session import needs_whole

    found = of.outline
    return found.device.type == "cpu" and (found.stored == found.dtype or needs_whole(of.plan) is None)


def _n_workers(settings: Settings) -> int:
    """Number of workers: as set, else what this machine has room for."""
    of = settings.executor
    if of.workers is not None:
        return int(of.workers)
    return max(1, int(len(os.sched_getaffinity(0)) / getattr(of, "cpus_per_worker", 1)))


def _in_each(held: Sequence[Holding], found: Outline, n_workers: int, *phases: Phase) -> list[Holding]:
    """Holdings of the workers; on a CPU those of a node map one copy of weights, dense side and levels."""
    from secateur.evaluators.forecast import memory

    own = [memory.of_process()]
    shared: list[Holding] = []
    for x in held:
        common = x.name.startswith("dense side") and (found.device.type == "cpu" or x.where == "disk")
        (shared if common else own).append(x)
    if found.device.type != "cpu":
        own += [x for x in memory.of_weights(found, phases) if x.where == "device"]
    found_own = [Holding(**{**vars(x), "during": tuple(p for p in x.during if p in phases)}) for x in own]
    return [*with_copies(shared, 1), *with_copies(found_own, n_workers)]


def _notes(work: SearchWork, speed: Speed | None) -> Iterator[str]:
    """Lines on costs that the forecast leaves out."""
    of = work.of
    if of.plan.space.kind == "recipe":
        yield "Statistics of recipes, collected when they are asked for (`space.cache_gb`), are not counted."
    if work.simulated is None:
        kind = work.settings.controller.kind
        yield f"`{kind}` can't be simulated: every measurement counts as one at the largest fidelity."
    if of.plan.tasks is not None:
        yield "Tasks are not counted."
    if of.plan.space.cases:
        yield "Further models and cases (`space.also`) are not counted."
    if speed is not None and speed.levels is None:
        yield "Making the levels of a block of this size takes longer than a short measurement: not timed."
