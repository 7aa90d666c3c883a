"""Start a search, or continue one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.bench import Say, open_bench, plan, silent
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UsageError
from secateur.search.executor import Executor, measure_all
from secateur.search.executors.registry import EXECUTORS
from secateur.search.loop import Observer, Outcome, Search
from secateur.search.mirror.address import check_storage
from secateur.search.mirror.mirror import Mirror
from secateur.search.mirror.optuna_copy import OptunaCopy
from secateur.search.mirror.storages import storage_of
from secateur.search.run import Run
from secateur.search.settings import Settings, identity, resolved
from secateur.search.study import About, Study
from secateur.spaces.measurement import Fidelity

if TYPE_CHECKING:
    from secateur.evaluators.workbench import Workbench

TEST_JOB = 4
"""Candidates a job on the test text: few, so that workers share the front evenly."""


def search(
    settings: Settings,
    directory: Path,
    *,
    observers: Sequence[Observer] = (),
    say: Say = silent,
    on_ready: Callable[[Search, Executor], None] = lambda search, executor: None,
    levels: Path | None = None,
) -> Outcome:
    """Search until the budget is used up, then measure the front on the test text.

    Args:
        settings: what to search.
        directory: of the run. The same settings continue it, also with another budget or target.
        observers: look on.
        say: told in one line what is being done.
        on_ready: given the search, whose `stop` ends it cleanly, and its executor, before it starts.
        levels: directory of the level store, for runs that share one; None: in the run's directory.

    Raises:
        UsageError: if something does not fit (model, text, target, storage, directory); the directory is left as it
            was.
        StudyWriteError: if the disk is full; the study can be continued.
    """
    check_storage(settings.storage)
    with EXECUTORS[settings.executor.kind].reached(settings.executor, plan(settings)):
        bench = open_bench(settings, say)
        about = About(
            identity=identity(settings) | {"content": bench.facts()},
            baselines={name: candidate.text for name, candidate in bench.space.baselines().items()},
            facts={"shape": _plain_shape(bench), "versions": _versions()},
        )
        controller = _controller(settings, bench, bench.plan.fidelities[:-1])
        with Study.open_or_create(directory, resolved(settings), about) as study:
            for warning in study.warnings:
                say(warning)
            levels = levels or directory / "levels"
            _build_levels(bench, levels, say)
            storage = storage_of(directory, settings.storage)
            fidelity = bench.plan.fidelities[-2]
            copy = OptunaCopy(study, bench.space, settings.objectives, fidelity, storage)
            with _executor(settings, bench, directory, levels, say) as executor, Mirror(copy, say) as mirror:
                loop = Search(
                    study,
                    bench.space.baselines(),
                    controller,
                    executor,
                    settings.budget,
                    fidelity,
                    batch=settings.executor.batch,
                    asks=None if settings.executor.deterministic else study.asks(_asked(settings, bench)),
                    kinship=bench.space.kinship,
                    observers=[*observers, mirror],
                )
                on_ready(loop, executor)
                outcome = loop.run()
                if outcome.reason != "stopped":
                    _measure_test(study, executor, bench.plan.fidelities[-1], say)
    return outcome


def _build_levels(bench: Workbench, levels: Path, say: Say) -> None:
    """Make the level store unless it is there.

    Raises:
        UsageError: if the metric is a formula that gives no ranking of a layer's weights.
    """
    from secateur.pruners.formulas.errors import FormulaError

    n_blocks = len(bench.anatomy.blocks)
    say("building levels")
    try:
        bench.build_levels(levels, lambda index: say(f"building levels {index + 1}/{n_blocks}"))
    except FormulaError as error:
        raise UsageError(f"{error} Choose another `space.metric`, or protect this layer.") from error


def _controller(settings: Settings, bench: Workbench, fidelities: tuple[Fidelity, ...]) -> Any:
    """The controller of the settings.

    Raises:
        UsageError: if they do not fit the space or the fidelities.
    """
    row = CONTROLLERS[settings.controller.kind]
    objectives = {"objectives": settings.objectives} if row.multi_objective else {}
    try:
        return row.build(bench.space, fidelities, settings.seed, settings.controller, **objectives)
    except ValueError as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class _InProcess:
    """A worker in this process, with the bench that is there already."""

    bench: Workbench
    levels: Path
    directories: tuple[Path, ...] = ()

    def __call__(self, directories: Sequence[Path]) -> Any:
        return self.bench.evaluator(self.levels)


def _executor(settings: Settings, bench: Workbench, directory: Path, levels: Path, say: Say) -> Executor:
    """The executor of the settings; its workers set up from the bench."""
    of, row = settings.executor, EXECUTORS[settings.executor.kind]
    if row.in_process:
        return row.build(of, _InProcess(bench, levels))
    from secateur.evaluators.kit import worker_setup

    say("starting workers")
    spread = of.gpus_per_worker > 1
    return row.build(
        of, worker_setup(bench, directory / "kit", levels, threads=of.worker_threads, spread=spread)
    )


def _asked(settings: Settings, bench: Workbench) -> dict[str, Any]:
    """What the proposals of a controller depend on, apart from measurements."""
    return {
        "controller": resolved(settings)["controller"],
        "seed": settings.seed,
        "objectives": settings.objectives,
        "fidelities": [fidelity.text for fidelity in bench.plan.fidelities[:-1]],
        "baselines": {name: candidate.text for name, candidate in bench.space.baselines().items()},
    }


def _measure_test(study: Study, executor: Executor, fidelity: Fidelity, say: Say) -> None:
    """The baselines and the front on the test part: for people, never for a controller."""
    view = Run(study)
    wanted = [trial.measurement.candidate for trial in [*view.baselines.values(), *view.front()]]
    missing = [text for text in dict.fromkeys(wanted) if study.lookup((text, fidelity.text)) is None]
    n_done = 0
    say(f"measuring on test text 0/{len(missing)}")
    for measured in measure_all(executor, missing, fidelity, size=TEST_JOB):
        study.append(measured)
        n_done += len(measured)
        say(f"measuring on test text {n_done}/{len(missing)}")


def _plain_shape(bench: Workbench) -> Mapping[str, Any]:
    """What readers need to know about the model, without torch."""
    shape = bench.space_shape
    return {"linears": [asdict(linear) for linear in bench.prunables], **asdict(shape)}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers")}
