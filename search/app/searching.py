"""Start a search, or continue one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.about import about_of, baselines_of, plugin_versions
from secateur.search.app.beside_truth import beside_truth
from secateur.search.app.bounded import target_lines
from secateur.search.app.exporting import LEVELS
from secateur.search.app.forecasting import stream_by
from secateur.search.app.level_building import build_levels, of_workers
from secateur.search.app.session import Say, on_driver, open_session, plan, silent, usage_errors
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UsageError
from secateur.search.executor import Executor, measure_all
from secateur.search.executors.registry import EXECUTORS
from secateur.search.loop.driven import DrivenRun
from secateur.search.loop.loop import Observer, Outcome, Search
from secateur.search.loop.notes import NotesKeeper
from secateur.search.mirror.address import check_storage, refuse_password
from secateur.search.mirror.mirror import Mirror
from secateur.search.mirror.optuna_copy import OptunaCopy
from secateur.search.mirror.storages import storage_of
from secateur.search.results.run import Run, notes_of_facts
from secateur.search.results.targets import best_by_target, target_sparsities
from secateur.search.settings.seeds import seeds_line
from secateur.search.settings.settings import Settings, identity, resolved
from secateur.search.study.about import ABOUT, About
from secateur.search.study.overlap import write_overlap
from secateur.search.study.study import Study
from secateur.search.tracking.trackers import check_trackers
from secateur.search.tracking.tracking import tracked
from secateur.spaces.forecast import Forecast
from secateur.spaces.measurement import MARGIN, TASK, Fidelity
from secateur.spaces.plugins import left_out
from secateur.spaces.streaming import Stream

if TYPE_CHECKING:
    from secateur.evaluators.session import Session
    from secateur.spaces.latency import LatencyTable

SOME_WORKERS = 4
"""Number of workers for the controller, where the cluster's room decides."""

N_DESCRIBED = 8
"""Number of the best candidates that are described beside the front."""

Foretell = Callable[[Say], Forecast | None]


def no_forecast(note: Say) -> None:
    """Forecast of a search that begins without one."""


TEST_JOB = 4
"""Candidates a job on the test text: few, so that workers share the front evenly."""


def search_stage(
    settings: Settings,
    directory: Path,
    *,
    observers: Sequence[Observer] = (),
    say: Say = silent,
    note: Say | None = None,
    on_ready: Callable[[Search, Executor], None] = lambda search, executor: None,
    levels: Path | None = None,
    forecast: Foretell = no_forecast,
) -> Outcome:
    """Search until the budget is used up, then measure the front on the test text.

    Args:
        settings: of the search.
        directory: of the run. The same settings continue it, also with another budget or target.
        observers: of the loop.
        say: given progress, one line at a time.
        note: given the lines of it that are to stay in sight; None: `say`.
        on_ready: given the search, whose `stop` ends it cleanly, and its executor, before it starts.
        levels: directory of the level store, for runs that share one; None: in the run's directory.
        forecast: makes the forecast of the search, kept in the run beside the truth, once settings, storage and
            directory are checked; given `note`.

    Raises:
        UsageError: if something does not fit (model, text, target, storage, directory); the directory is left as it
            was.
        StudyWriteError: if the disk is full; the study can be continued.
    """
    refuse_password(settings.storage)
    check_trackers(settings.trackers)
    for line in (*check_storage(settings.storage), *left_out()):
        (note or say)(line)
    settings = as_before(settings, directory)
    with DrivenRun(directory, identity(settings)) as driven:
        told, noted = driven.telling(say), driven.telling(note or say)
        foreseen = forecast(noted)
        stream = stream_by(foreseen, settings.stream)
        with beside_truth(foreseen, [directory]):
            outcome = _search(
                settings, directory, driven, [*observers, driven], told, noted, on_ready, levels, stream
            )
        driven.end(outcome)
    return outcome


def _search(  # what `search_stage` is given
    settings: Settings,
    directory: Path,
    driven: DrivenRun,
    observers: Sequence[Observer],
    say: Say,
    note: Say,
    on_ready: Callable[[Search, Executor], None],
    levels: Path | None,
    stream: Stream,
) -> Outcome:
    """Search in a run that is driven, and measure what was found."""
    of_plugins = plugin_versions(settings)
    note(seeds_line(settings))
    with EXECUTORS[settings.executor.kind].reached(settings.executor, plan(settings)):
        settings, session, about, _ = prepared(
            settings, directory, of_plugins, say, note, stream
        )  # nothing is written yet
        with Study.open_or_create(directory, resolved(settings), about, driven.lock) as study:
            Run(study).check()
            for line in (*settings.renamed_keys, *study.warnings, *notes_of_facts(about.facts)):
                say(line)
            levels = levels or directory / LEVELS
            build_levels(settings, session, levels, say)
            with usage_errors():
                session.open_damaged(directory, levels)
            study.name_baselines(baselines_of(session))  # some are known by now only
            controller = _controller(settings, session)
            _warn_of_budget(settings, controller, say)
            storage = storage_of(directory, settings.storage)
            fidelity = session.plan.fidelities[-2]
            copy = OptunaCopy(study, session.space, settings.objectives, fidelity, storage)
            keeper = NotesKeeper(directory, settings.controller.kind, controller)
            with (
                _executor(settings, session, directory, levels, say) as executor,
                Mirror(copy, say) as mirror,
                tracked(settings, directory, baselines_of(session), note) as trackers,
            ):
                loop = Search(
                    study,
                    session.space.baselines(),
                    controller,
                    executor,
                    settings.budget,
                    fidelity,
                    batch=settings.executor.batch,
                    asks=None if settings.executor.deterministic else study.asks(_asked(settings, session)),
                    locality_key=session.space.locality_key,
                    observers=[*observers, mirror, keeper, *trackers],
                )
                on_ready(loop, executor)
                outcome = loop.run()
                if outcome.reason != "stopped":
                    _measure_test(study, executor, session.plan.fidelities[-1], say)
            if outcome.reason != "stopped":
                _describe(study, session, levels, say)
    return outcome


def prepared(
    settings: Settings, directory: Path, of_plugins: dict[str, str], say: Say, note: Say, stream: Stream
) -> tuple[Settings, Session, About, Any]:
    """The settings with what they left to the model, its session, the run's description and the controller.

    Nothing is written.

    Args:
        stream: the word to open the model with, after the forecast.

    Raises:
        UsageError: if something does not fit.
    """
    of_driver = on_driver(settings.model_copy(update={"stream": stream}), note)
    session = open_session(of_driver, say, _table_of(directory))
    settings = _settled(settings, session, say)
    for line in target_lines(settings, session.dense.shape):
        note(line)
    _check_objectives(settings, session)
    return (
        settings,
        session,
        about_of(settings, session, of_plugins, directory),
        _controller(settings, session),
    )


def as_before(settings: Settings, directory: Path) -> Settings:
    """The settings; what they leave to the model or to another seed is as the run in the directory has it."""
    if not (directory / ABOUT).is_file():
        return settings
    recorded = Run(Study.without_trials(directory)).settings
    settings = _with_seeds(settings, recorded)
    stored = recorded.space
    missing = [key for key in settings.space.by_model if getattr(settings.space, key) is None]
    if not missing or stored.kind != settings.space.kind:
        return settings
    found = {key: getattr(stored, key) for key in missing}
    return settings.model_copy(update={"space": settings.space.model_copy(update=found)})


def _with_seeds(settings: Settings, recorded: Settings) -> Settings:
    """The settings, with the recorded seeds of data and training where they name none."""
    of = settings.evaluator
    if of.training is not None and of.training.seed is None:
        training = of.training.model_copy(update={"seed": recorded.training_seed})
        of = of.model_copy(update={"training": training})
    if of.seed is None:
        of = of.model_copy(update={"seed": recorded.data_seed})
    return settings.model_copy(update={"evaluator": of})


def _settled(settings: Settings, session: Session, say: Say) -> Settings:
    """The settings with what they left to the model, which is said."""
    space = session.plan.space
    chosen = [key for key in space.by_model if getattr(settings.space, key) is None]
    if not chosen:
        return settings
    say("chosen for this model: " + ", ".join(f"{key} {getattr(space, key)}" for key in chosen))
    found = {key: getattr(space, key) for key in chosen}
    return settings.model_copy(update={"space": settings.space.model_copy(update=found)})


def _table_of(directory: Path) -> LatencyTable | None:
    """The latency table that a run began with, and keeps, whatever was measured since."""
    if not (directory / ABOUT).is_file():
        return None
    return Run(Study.without_trials(directory)).shape.latency


def _warn_of_budget(settings: Settings, controller: Any, say: Say) -> None:
    """Report a budget too small for a result of the controller, before anything is spent."""
    needed, given = controller.n_measurements, settings.budget.evaluations
    if given is not None and needed > given:
        say(
            f"`budget.evaluations` {given} ends before `{settings.controller.kind}` has a result of its own: "
            f"it needs about {needed} measurements first. Raise it, or choose a coarser space."
        )


@usage_errors()
def _check_objectives(settings: Settings, session: Session) -> None:
    """Raise a UsageError unless measurements will have the objectives."""
    tasks: list[str] = []
    if session.task_set is not None:
        tasks = [prefix + name for prefix in (TASK, MARGIN) for name in session.task_set.names]
        for name in (x for x in (*settings.optimised, settings.evaluator.loss) if x.startswith(MARGIN)):
            session.task_set.check_margins(name.removeprefix(MARGIN))
    if session.plan.margin is not None and session.task_set is not None:
        session.task_set.held_out()  # for the test's loss
    costs = session.space.cost(session.space.baselines()["dense"])
    known = ["loss", "kl", "ce", *settings.measures, *costs, *tasks]
    for name in settings.optimised:
        if name not in known:
            raise UsageError(
                f"Expected `objectives` that candidates of the space {settings.space.kind} have, got {name!r}. "
                f"They have: {', '.join(known)}."
            )


@usage_errors()
def _controller(settings: Settings, session: Session) -> Any:
    """The controller of the settings.

    Raises:
        UsageError: if they do not fit the space or the fidelities.
    """
    row = CONTROLLERS[settings.controller.kind]
    more: dict[str, Any] = {"objectives": settings.objectives} if row.multi_objective else {}
    more |= {"proxy": session.plan.proxy} if row.screens(settings.controller) else {}
    more |= {"n_workers": _n_workers(settings)} if row.islands else {}
    return row.build(session.space, session.plan.fidelities[:-1], settings.seed, settings.controller, **more)


def _n_workers(settings: Settings) -> int:
    """Number of workers for the controller; 1 where the search must not depend on it."""
    of = settings.executor
    return 1 if of.deterministic else of.workers or SOME_WORKERS


@dataclass(frozen=True)
class _InProcess:
    """A worker in this process, with the open session."""

    session: Session
    levels: Path
    directories: tuple[Path, ...] = ()

    def __call__(self, directories: Sequence[Path]) -> Any:
        return self.session.evaluator(self.levels)


def _executor(settings: Settings, session: Session, directory: Path, levels: Path, say: Say) -> Executor:
    """The executor of the settings; its workers set up from the session."""
    of, row = settings.executor, EXECUTORS[settings.executor.kind]
    if row.in_process:
        return row.build(of, _InProcess(session, levels))
    from secateur.evaluators.worker_setup import worker_setup

    say("starting workers")
    return row.build(of, worker_setup(session, directory / "kit", levels, **of_workers(settings)))


def _asked(settings: Settings, session: Session) -> dict[str, Any]:
    """Values that the proposals of a controller depend on, apart from measurements."""
    row, proxy = CONTROLLERS[settings.controller.kind], session.plan.proxy
    more: dict[str, Any] = {}
    more |= {"proxy": proxy and proxy.text} if row.screens(settings.controller) else {}
    more |= {"n_workers": _n_workers(settings)} if row.islands else {}
    return more | {
        "controller": resolved(settings)["controller"],
        "seed": settings.seed,
        "objectives": settings.objectives,
        "fidelities": [fidelity.text for fidelity in session.plan.fidelities[:-1]],
        "baselines": baselines_of(session),
    }


def _measure_test(study: Study, executor: Executor, fidelity: Fidelity, say: Say) -> None:
    """Measure baselines, front and the best of each target on the test part: for people, never for a controller."""
    view = Run(study)
    best = best_by_target(
        view.trials(), target_sparsities(view.baselines)
    )  # on no front if the loss alone is searched
    shown = [*view.baselines.values(), *view.front(), *best.values()]
    wanted = [trial.measurement.candidate for trial in shown]
    missing = [text for text in dict.fromkeys(wanted) if study.lookup((text, fidelity.text)) is None]
    n_done = 0
    say(f"measuring on test text 0/{len(missing)}")
    for measured in measure_all(executor, missing, fidelity, size=TEST_JOB):
        study.append(measured)
        n_done += len(measured)
        say(f"measuring on test text {n_done}/{len(missing)}")


def _describe(study: Study, session: Session, levels: Path, say: Say) -> None:
    """Write facts about the front and the best candidates, for readers without torch."""
    if not session.pruner.described:
        return
    say(f"comparing {session.pruner.described}")
    view = Run(study)
    best = sorted(view.trials(), key=lambda trial: trial.measurement.values["loss"])[:N_DESCRIBED]
    texts = dict.fromkeys(trial.measurement.candidate for trial in [*best, *view.front()])
    write_overlap(study.directory, session.pruner.describe(levels, list(texts)))
