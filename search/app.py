"""The one place that puts the rooms together: start a search, read a run, export, evaluate.

Everything that needs torch is imported inside the functions, so that reading a run stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.address import check_storage
from secateur.search.controller import Trial
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UsageError
from secateur.search.executor import Executor, measure_all
from secateur.search.executors.registry import EXECUTORS
from secateur.search.loop import Observer, Outcome, Search
from secateur.search.mirror import Mirror
from secateur.search.optuna_copy import OptunaCopy
from secateur.search.run import Run
from secateur.search.settings import Settings, identity, load_settings, resolved, settings_from
from secateur.search.storages import storage_of
from secateur.search.study import About, Study
from secateur.spaces.measurement import Fidelity

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary
    from secateur.evaluators.workbench import Plan, Workbench
    from secateur.search.recovery import Recovered, RecoverySettings

__all__ = ["SearchedRun", "evaluate", "export", "load_settings", "open_run", "recover", "run", "search"]

Say = Callable[[str], None]

TEST_JOB = 4
"""Candidates a job on the test text: few, so that workers share the front evenly."""


class SearchedRun(Run):
    """A run that can also make its models."""

    def export(self, trial: Trial, to: str | Path, *, calibration: str | None = None) -> ExportSummary:
        """See `export`."""
        return export(self.study.directory, trial, Path(to), calibration=calibration)


def open_run(directory: str | Path) -> SearchedRun:
    """A run to read from and to export from.

    Raises:
        UsageError: if the directory holds no study.
    """
    return SearchedRun(Study.open(directory))


def _silent(line: str) -> None:
    """Say nothing."""


def run(directory: str | Path, *, say: Say = _silent, **settings: Any) -> SearchedRun:
    """Search, or continue where a search stopped, and give the run: the way in from Python.

    Args:
        directory: of the run; made if it is missing.
        say: told in one line what is being done.
        settings: as in a settings file, e.g. ``model="tiny", space={"target": 0.5}``.

    Raises:
        UsageError: if the settings are wrong, or the directory belongs to another search.
    """
    search(settings_from(settings), Path(directory), say=say)
    return open_run(directory)


def search(
    settings: Settings,
    directory: Path,
    *,
    observers: Sequence[Observer] = (),
    say: Say = _silent,
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
    bench = open_bench(settings, say)
    about = About(
        identity=identity(settings) | {"content": bench.facts()},
        baselines={name: candidate.text for name, candidate in bench.space.baselines().items()},
        facts={"shape": _plain_shape(bench), "versions": _versions()},
    )
    controller = _controller(settings, bench, bench.plan.fidelities[:-1])
    row = EXECUTORS[settings.executor.kind]
    with (
        row.reached(settings.executor, (bench.plan, bench.space)),
        Study.open_or_create(directory, resolved(settings), about) as study,
    ):
        for warning in study.warnings:
            say(warning)
        levels = levels or directory / "levels"
        n_blocks = len(bench.anatomy.blocks)
        bench.build_levels(levels, lambda index: say(f"building levels {index + 1}/{n_blocks}"))
        fidelities = bench.plan.fidelities
        storage = storage_of(directory, settings.storage)
        copy = OptunaCopy(study, bench.space, settings.objectives, fidelities[-2], storage)
        with _executor(settings, bench, directory, levels, say) as executor, Mirror(copy, say) as mirror:
            loop = Search(
                study,
                bench.space.baselines(),
                controller,
                executor,
                settings.budget,
                fidelities[-2],
                batch=settings.executor.batch,
                asks=None if settings.executor.deterministic else study.asks(_asked(settings, bench)),
                kinship=bench.space.disassemble,
                observers=[*observers, mirror],
            )
            on_ready(loop, executor)
            outcome = loop.run()
            if outcome.reason != "stopped":
                _measure_test(study, executor, fidelities[-1], say)
    return outcome


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


def plan(settings: Settings) -> Plan:
    """The settings as what a worker needs to know."""
    from secateur.evaluators.workbench import Plan

    of, data = settings.evaluator, settings.evaluator.data
    return Plan(
        model=settings.model,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        space=settings.space,
        loss=of.loss,
        calibration=data.calibration,
        search=data.search,
        test=data.test,
        window=of.window,
        calibration_tokens=of.calibration_tokens,
        search_fidelities=of.fidelities,
        test_tokens=of.test_tokens,
        seed=of.seed,
    )


def open_bench(settings: Settings, say: Say = _silent) -> Workbench:
    """The model, its space and its data, ready to measure and prune.

    Raises:
        UsageError: if something in the settings does not fit the model or the texts.
    """
    from secateur.evaluators.workbench import Workbench, set_threads

    set_threads(getattr(settings.executor, "threads", None))
    try:
        return Workbench(plan(settings), say)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def _plain_shape(bench: Workbench) -> Mapping[str, Any]:
    """What readers need to know about the model, without torch."""
    shape = bench.space_shape
    return {"linears": [asdict(linear) for linear in bench.prunables], **asdict(shape)}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers")}


def export(
    directory: Path,
    trial: Trial,
    to: Path,
    *,
    calibration: str | None = None,
    say: Say = _silent,
) -> ExportSummary:
    """Prune the model once more, for real, measure it, and save it as a directory that transformers loads.

    Args:
        directory: of the run.
        trial: of its study.
        to: new or empty directory, or one that holds this export already.
        calibration: ``sequential`` (statistics of a block from already pruned blocks), ``dense`` (the very
            weights that the search measured); None as the settings say.
        say: told in one line what is being done.

    Raises:
        UsageError: if the run's model or data have changed, or `to` is not empty.
        ExportError: if the model can't be written, or does not load as it should.
    """
    from secateur.evaluators.exporting import export_candidate

    view = open_run(directory)
    bench = open_bench(view.settings, say)
    _check_content(view, bench)
    candidate = trial.measurement.candidate
    return export_candidate(
        bench,
        candidate,
        to,
        sequential=(calibration or bench.plan.space.calibration) == "sequential",
        seeds={"evaluator": bench.plan.seed, "search": view.settings.seed},
        searched=_as_searched(view, candidate, bench.plan.fidelities[-2:]),
        say=say,
    )


def recover(
    directory: Path, trials: Sequence[Trial], settings: RecoverySettings, *, say: Say = _silent
) -> list[Recovered]:
    """Train the models of trials for longer, one Ray Tune run each, and add them to the study as ``recovered``.

    The same call continues one that was stopped or killed. Trials of the same budget compete: the worse ones are
    ended early. The text is the calibration part; validation is on the search part, the result on the test part.

    Args:
        directory: of the run.
        trials: of its study.
        settings: how to train.
        say: told in one line what is being done.

    Raises:
        UsageError: if Ray or PEFT is not installed, the run's model or data have changed, somebody is writing the
            run, or a trial was recovered by another recipe with as many tokens.
    """
    from secateur.evaluators.recovery import Recovery, RecoveryJob, export_recovered, new_recipe
    from secateur.search.recovery import Stage
    from secateur.search.tuning import ray_started, train_all

    view = open_run(directory)
    of, bench = view.settings, open_bench(view.settings, say)
    _check_content(view, bench)
    try:
        recipe = new_recipe(settings.recipe, bench)
    except ValueError as error:
        raise UsageError(str(error)) from error
    picked = view.as_searched(trials)
    budgets = {bench.space.budget_of(bench.space.parse(t.measurement.candidate)) for t in picked}
    make = partial(
        RecoveryJob,
        bench.plan,
        sequential=bench.plan.space.calibration == "sequential",
        recipe=recipe,
        threads=getattr(of.executor, "threads", None),
    )
    jobs = {trial.number: make(candidate=trial.measurement.candidate) for trial in picked}
    seeds = {"evaluator": bench.plan.seed, "search": of.seed}
    del bench  # the workers have their own

    with Study.open_or_create(directory, view.study.settings, view.study.about) as study:
        stage = Stage(study, picked, recipe.to_json(), of.evaluator.test_tokens)

        def train(numbers: Sequence[int]) -> Mapping[int, Any]:
            say("starting Ray")
            with ray_started(settings.address):
                return train_all(
                    {number: partial(Recovery, jobs[number]) for number in numbers},
                    stage.experiment,
                    competing=len(numbers) > 1 == len(budgets),
                    use_gpu=of.device != "cpu",
                    say=say,
                )

        return stage.run(
            train, lambda number, state, to: export_recovered(jobs[number], state, to, seeds=seeds, say=say)
        )


def _as_searched(view: Run, candidate: str, fidelities: Sequence[Fidelity]) -> dict[str, dict[str, float]]:
    """What the study knows about the candidate."""
    found = {fidelity: view.study.lookup((candidate, fidelity.text)) for fidelity in fidelities}
    return {
        f"{fidelity.text}, as searched": {name: trial.measurement.values[name] for name in ("kl", "ce")}
        for fidelity, trial in found.items()
        if trial is not None and trial.measurement.infeasible is None
    }


def _check_content(view: Run, bench: Workbench) -> None:
    old, new = view.study.about.identity["content"], bench.facts()
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        raise UsageError(
            f"Expected the model and texts that {view.study.directory} was searched with, got another "
            f"{', '.join(changed)}. Restore them, or search again."
        )


def evaluate(
    model: str,
    *,
    text: str = "docs",
    part: str = "test",
    n_tokens: int = 8192,
    window: int = 512,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Say = _silent,
) -> dict[str, float | str | int]:
    """Perplexity of a model on a text, in windows without overlap, and how many of its weights are zero.

    Args:
        model: see `load_model`.
        text: source of text; of ``docs`` the topics of `part`.
        n_tokens: tokens to measure on, a multiple of `window`.
        window: tokens that the model sees at once.

    Raises:
        UsageError: if the model or the text is not what it should be.
    """
    from secateur.evaluators.perplexity import evaluate_model

    try:
        return evaluate_model(
            model,
            text=text,
            part=part,
            n_tokens=n_tokens,
            window=window,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            say=say,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
