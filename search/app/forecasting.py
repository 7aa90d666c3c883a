"""Forecasts of searches from settings and config.json alone, and the lines that a command begins with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.forecast_parts import (
    calibration_line,
    parse_devices,
    room_of,
    subject_of,
    with_streamed,
)
from secateur.search.app.forecast_prune import forecast_prune
from secateur.search.app.recipe_file import file_for
from secateur.search.app.session import Say, on_driver, plan, silent, usage_errors
from secateur.search.budget import Budget
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UsageError
from secateur.search.executors.registry import EXECUTORS
from secateur.search.loop.simulation import Simulation, simulate
from secateur.search.settings.settings import Settings
from secateur.spaces.forecast import Forecast, Holding, Phase, Work, with_copies
from secateur.spaces.measurement import Fidelity, Part
from secateur.spaces.space import SeparableSpace
from secateur.spaces.streaming import Stream, stream_word

if TYPE_CHECKING:
    from secateur.evaluators.forecast.prospect import Outline, Prospect
    from secateur.evaluators.forecast.speed import Speed


def planned(
    settings: Settings,
    recipe: str | None = None,
    sparsity: float = 0.5,
    device: str | None = None,
    *,
    timing: bool = True,
    directory: Path | None = None,
    say: Say = silent,
) -> Forecast:
    """Forecast of a search, or of a pruning of its model.

    Args:
        settings: of the search; of a pruning the model and how it is loaded are used.
        recipe: name or file; None: a search.
        sparsity: share that the recipe removes.
        device: see `parse_devices`; None: that of the settings.
        timing: time a block of this shape on this machine.
        directory: of the run; None: ``runs``.
        say: given progress, one line at a time.

    Raises:
        UsageError: if settings, recipe or devices don't fit.
    """
    devices = [] if device is None else parse_devices(device)
    if recipe is None:
        return forecast_search(settings, directory or Path("runs"), devices=devices, timing=timing, say=say)
    file, _ = file_for(recipe, sparsity)
    loading = {key: getattr(settings, key) for key in ("dtype", "device", "trust_remote_code")}
    of = settings.evaluator
    return forecast_prune(
        stream=settings.stream,
        file=file,
        model=settings.model,
        tokens=of.test_tokens,
        window=of.window,
        loading=loading,
        devices=devices,
        timing=timing,
        say=say,
    )


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
    simulated = _simulated(settings, of)
    in_process = EXECUTORS[settings.executor.kind].in_process
    n_workers = 0 if in_process else _n_workers(settings)
    with of.outline.shapes:
        pruner = of.pruner()
        streamed, kinds = pruner.streamed, tuple(pruner.gradients)
        worked = _shared(settings, of, simulated)
    window, sizes = of.plan.window, _sizes(of)
    driver: tuple[Phase, ...] = ("load", "prepare", "search", "test")
    tokens = memory.empty_tokens(of.plan.calibration_tokens, window)
    holdings = memory.of_statistics(of.outline, streamed, kinds, tokens, "prepare")
    holdings += memory.of_kept_states(of.outline, streamed, tokens, "prepare")
    phases: Mapping[Part, Sequence[Phase]] = {"search": ("search", "test"), "test": ("test",)}
    held = memory.of_data(of.outline, window, sizes, phases, shared=not in_process)
    with of.outline.shapes:
        store = memory.of_store(pruner, ("search", "test"))
        held += memory.of_levels(pruner, ("search", "test"))
        held += memory.of_candidates(pruner, worked and worked.state_bytes, ("search", "test"))
    if of.plan.training is not None:
        held += memory.of_training(of.outline, of.plan.training, window, ("search", "test"))
    holdings += store
    holdings += held if in_process else _of_workers(held, of.outline, n_workers)
    weights = memory.of_weights(of.outline, driver)
    by_block = memory.of_streamed_weights(of.outline, driver, ("prepare",)) if may_stream(of) else None
    speed = None
    if timing and not planned:
        from secateur.evaluators.forecast.speed import measure_speed

        say("timing a block of this shape")
        speed = measure_speed(of.outline, of.plan.window, of.plan)
    whole = Forecast(
        subject=subject_of(
            settings.model, of.outline, space=settings.space.kind, controller=settings.controller.kind
        ),
        device=of.outline.device.type,
        holdings=(memory.of_process(), *weights, *holdings),
        work=tuple(_search_work(settings, of, simulated, worked, speed, max(1, n_workers))),
        room=room_of(of.outline, directory, devices),
        calibrated=calibration_line(speed),
        notes=tuple(_notes(settings, of, speed, simulated)),
    )
    return with_streamed(whole, settings.stream, by_block and (*by_block, *holdings))


def may_stream(of: Prospect) -> bool:
    """True if the model of a search can be streamed, as far as its config says."""
    from secateur.evaluators.session import needs_whole

    found = of.outline
    return found.device.type == "cpu" and (found.stored == found.dtype or needs_whole(of.plan) is None)


def _sizes(of: Prospect) -> dict[Part, int]:
    """Tokens of the largest fidelity of each part."""
    return {"search": of.plan.fidelities[-2].n_tokens, "test": of.plan.fidelities[-1].n_tokens}


def _n_workers(settings: Settings) -> int:
    """Number of workers: as set, else what this machine has room for."""
    of = settings.executor
    if of.workers is not None:
        return int(of.workers)
    return max(1, int(len(os.sched_getaffinity(0)) / getattr(of, "cpus_per_worker", 1)))


def _of_workers(held: Sequence[Holding], found: Outline, n_workers: int) -> list[Holding]:
    """Holdings of the workers; on a CPU those of a node map one copy of weights, dense side and levels."""
    from secateur.evaluators.forecast import memory

    own = [memory.of_process()]
    shared: list[Holding] = []
    for x in held:
        common = x.name.startswith("dense side") and (found.device.type == "cpu" or x.where == "disk")
        (shared if common else own).append(x)
    if found.device.type != "cpu":
        own += [x for x in memory.of_weights(found, ("search", "test")) if x.where == "device"]
    found_own = [
        Holding(**{**vars(x), "during": tuple(p for p in x.during if p in ("search", "test"))}) for x in own
    ]
    return [*with_copies(shared, 1), *with_copies(found_own, n_workers)]


def _simulated(settings: Settings, of: Prospect) -> Simulation | None:
    """Jobs of the search; None where its controller learns from more than losses."""
    row, fidelities = CONTROLLERS[settings.controller.kind], of.plan.fidelities[:-1]
    if row.screens(settings.controller) or (
        of.plan.curvature is not None and not isinstance(of.space, SeparableSpace)
    ):
        return None
    more: dict[str, Any] = {"objectives": settings.objectives} if row.multi_objective else {}
    controller = row.build(of.space, fidelities, settings.seed, settings.controller, **more)
    batch = settings.executor.batch
    return simulate(of.space, controller, settings.budget, fidelities[-1], batch, settings.optimised)


def _shared(settings: Settings, of: Prospect, simulated: Simulation | None) -> Any:
    """Work of the simulated jobs; None where there are none."""
    from secateur.evaluators.forecast.sharing import shared_work

    if simulated is None:
        return None
    fidelities = of.plan.fidelities[:-1]
    return shared_work(simulated.jobs, of.pruner(), of.plan.window, fidelities, of.outline.dtype.itemsize)


def _search_work(
    settings: Settings,
    of: Prospect,
    simulated: Simulation | None,
    worked: Any,
    speed: Speed | None,
    n_workers: int,
) -> Iterator[Work]:
    """Steps of a search with their times."""
    from secateur.evaluators.forecast.speed import block_shares

    shares = block_shares(of.anatomy, of.plan.window)
    stack, sizes = sum(shares), _sizes(of)
    n_bytes = sum(x.nbytes for x in of.anatomy.model.parameters())
    yield Work(
        "loading",
        None if speed is None else 2 * speed.read * n_bytes,
        0,
        "weights are read, converted and checked",
        "dtype",
    )
    n_calibration = of.plan.calibration_tokens
    watched = None if speed is None else n_calibration * stack * (speed.watched or 0.0)
    if of.pruner().gradients and speed is not None and watched is not None:
        watched += 3 * n_calibration * (stack * speed.block + speed.loss)
    yield Work(
        "statistics",
        watched,
        n_calibration,
        "calibration tokens, block by block",
        "evaluator.calibration_tokens",
    )
    levels = None if speed is None or speed.levels is None else speed.levels * stack
    yield Work("levels", levels, 0, "made and written for each block", "space.step, space.metric")
    n_dense = sum(sizes.values())
    dense = None if speed is None else n_dense * (stack * speed.block + speed.teacher)
    yield Work("dense side of the loss", dense, n_dense, "search and test text", "evaluator.fidelities")
    yield _evaluations(settings, of, simulated, worked, speed, shares, n_workers)
    n_tested = len(of.space.baselines()) + len(of.space.targets)
    tested = n_tested * sizes["test"]
    seconds = None if speed is None else tested * (stack * speed.block + speed.loss) / n_workers
    yield Work(
        "test",
        seconds,
        tested,
        f"baselines, and one of the front a target: {n_tested}",
        "evaluator.test_tokens",
    )


def _evaluations(
    settings: Settings,
    of: Prospect,
    simulated: Simulation | None,
    worked: Any,
    speed: Speed | None,
    shares: Sequence[float],
    n_workers: int,
) -> Work:
    """All evaluations of the search."""
    budget, setting = settings.budget, "budget, evaluator.fidelities"
    if simulated is None or worked is None:
        n_all = most_tokens(budget, of.plan.fidelities[:-1], len(of.space.baselines()))
        seconds = None if speed is None else n_all * (sum(shares) * speed.block + speed.loss) / n_workers
        return Work(
            "evaluations",
            _within(budget, seconds, n_workers),
            n_all,
            "the budget at the largest fidelity",
            setting,
        )
    n_all = sum(fidelity.total_tokens * len(found) for fidelity, found in simulated.jobs)
    n_evaluations = sum(len(found) for _, found in simulated.jobs)
    seconds = None
    if speed is not None:
        smaller = _macs_share(of, [x for _, found in simulated.jobs for x in found])
        inside = sum(n * shares[block] for block, n in worked.block_tokens.items()) * speed.block * smaller
        seconds = inside + worked.head_tokens * speed.loss + worked.switches * (speed.switch or 0.0)
        trained = sum(fidelity.n_trained * len(found) for fidelity, found in simulated.jobs)
        seconds += 4 * trained * (sum(shares) * speed.block + speed.loss)
        seconds /= simulated.share * n_workers
    saved = 1 - sum(worked.block_tokens.values()) / max(1, worked.head_tokens * len(shares))
    n = n_evaluations / simulated.share
    why = f"{n:,.0f} measurements in a simulated search, {max(saved, 0):.0%} of the blocks shared"
    return Work(
        "evaluations", _within(budget, seconds, n_workers), round(n_all / simulated.share), why, setting
    )


def _within(budget: Budget, seconds: float | None, n_workers: int) -> float | None:
    """The time, no longer than the budget's minutes."""
    if budget.minutes is None:
        return seconds
    limit = 60 * budget.minutes / n_workers
    return limit if seconds is None else min(limit, seconds)


def _macs_share(of: Prospect, candidates: Sequence[Any]) -> float:
    """Mean share of the dense model's multiply-accumulates that candidates have."""
    if not of.dense.shape.blocks or not candidates:
        return 1.0
    dense = of.space.cost(of.space.baselines()["dense"]).get("macs")
    found = [of.space.cost(x).get("macs") for x in candidates]
    return sum(found) / len(found) / dense if dense and None not in found else 1.0


def most_tokens(budget: Budget, fidelities: Sequence[Fidelity], n_baselines: int) -> int:
    """Largest number of tokens that the budget allows, baselines included."""
    largest = max(fidelity.total_tokens for fidelity in fidelities)
    given = [budget.tokens] if budget.tokens is not None else []
    if budget.evaluations is not None:
        given.append(budget.evaluations * largest)
    return max(min(given, default=0), n_baselines * largest)


def _notes(
    settings: Settings, of: Prospect, speed: Speed | None, simulated: Simulation | None
) -> Iterator[str]:
    """Lines on costs that the forecast leaves out."""
    if of.plan.space.kind == "recipe":
        yield "Statistics of recipes, collected when they are asked for (`space.cache_gb`), are not counted."
    if simulated is None:
        kind = settings.controller.kind
        yield f"`{kind}` can't be simulated: every measurement counts as one at the largest fidelity."
    if of.plan.tasks is not None:
        yield "Tasks are not counted."
    if of.plan.space.cases:
        yield "Further models and cases (`space.also`) are not counted."
    if speed is not None and speed.levels is None:
        yield "Making the levels of a block of this size takes longer than a short measurement: not timed."


ALL_MACS = 2e11
"""Multiply-accumulates of a command beyond which a block is timed for its forecast: less takes seconds."""


def foretold(make: Callable[[bool], Forecast], note: Say, *, anyway: bool = False) -> Forecast | None:
    """Forecast of a command that is about to run, which is told; None if there is none for this model.

    It is that of a streamed model where the model does not fit as a whole, and does so.

    What is wrong with settings or model is left for the command to say.

    Args:
        make: the forecast, with times or without.
        note: given its lines.
        anyway: go on where something does not fit.

    Raises:
        UsageError: if something does not fit.
    """
    from secateur.search.show.forecast import refusal, short_lines

    try:
        found = make(False)
        if refusal(_fitting(found, silent)) is None and found.tokens * found.subject["parameters"] > ALL_MACS:
            found = make(True)
        found = _fitting(found, note)
    except ValueError:
        return None
    except Exception as error:  # noqa: BLE001  # of torch and transformers, on a model without memory: no reason to stop
        note(f"forecast: none for this model ({type(error).__name__})")
        return None
    for line in short_lines(found):
        note(line)
    problem = refusal(found)
    if problem and not anyway:
        raise UsageError(f"{problem} `--anyway` goes on regardless.")
    return found


def _fitting(found: Forecast, note: Say) -> Forecast:
    """The forecast, or that of a streamed model where this alone fits, which is said."""
    streamed = found.streamed
    if streamed is None or found.too_large() is None or streamed.too_large() is not None:
        return found
    note("the model does not fit as a whole, and is streamed")
    return streamed


def stream_by(forecast: Forecast | None, word: str) -> Stream:
    """The word for `open_model` after the forecast: a model of which nothing was foretold is streamed as was asked.

    Raises:
        UsageError: if it is no word of `STREAM`.
    """
    try:
        asked = stream_word(word)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return "always" if forecast is not None and forecast.subject.get("stream") == "always" else asked


def forecast_before(
    settings: Settings, directory: Path, note: Say, *, anyway: bool = False
) -> Forecast | None:
    """Forecast of a search that is about to begin, see `foretold`."""
    return foretold(lambda timing: forecast_search(settings, directory, timing=timing), note, anyway=anyway)
