"""Session of a search: the model, its space and its data, opened by settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.method_sources import recorded_sources
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UnavailableError, UsageError
from secateur.search.results.run import Run
from secateur.search.settings.evaluator import LatencySettings
from secateur.search.settings.settings import Settings
from secateur.search.settings.training import TrainingSettings
from secateur.spaces.located import located
from secateur.spaces.measurement import MARGIN, TASK
from secateur.spaces.no_answer import NoAnswerError
from secateur.spaces.streaming import Stream

if TYPE_CHECKING:
    from secateur.evaluators.latency.store import TableSource
    from secateur.evaluators.plan import SessionPlan
    from secateur.evaluators.session import Session
    from secateur.evaluators.tasks.task_set import TaskPlan
    from secateur.evaluators.training.settings import Training
    from secateur.spaces.latency import LatencyTable

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the ValueErrors of the rooms below into errors in settings; also a decorator."""
    try:
        yield
    except UsageError:
        raise
    except NoAnswerError as error:
        raise UnavailableError(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error


@usage_errors()
def plan(settings: Settings, table: LatencyTable | None = None) -> SessionPlan:
    """The plan of the settings' session.

    Args:
        table: the latency table of a run that is opened again; None: that of the settings.
    """
    from secateur.evaluators.data.sources import located_text
    from secateur.evaluators.plan import SessionPlan

    of, data, folders = settings.evaluator, settings.evaluator.data, settings.folders
    locate, text = partial(located, folders=folders), partial(located_text, folders=folders)
    return SessionPlan(
        model=settings.model,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        space=settings.space.located(locate, text),
        loss=of.loss,
        calibration=text(data.calibration),
        search=text(data.search),
        test=text(data.test),
        contrast=None if data.contrast is None else text(data.contrast),
        window=of.window,
        calibration_tokens=of.calibration_tokens,
        fidelities=(*of.search_fidelities, of.test_fidelity),
        seed=settings.data_seed,
        training=None if of.training is None else _training(of.training, settings.training_seed),
        latency=_table_source(settings, table),
        tasks=_task_plan(settings),
        bos=of.bos,
        moe_all_experts=of.moe_all_experts,
        allow_long_windows=of.allow_long_windows,
        measures=settings.measures,
        curvature=CONTROLLERS[settings.controller.kind].curvature(settings.controller, of.search_fidelities),
        folders=folders,
        stream=settings.stream,
        compiled=settings.compile == "always",
    )


def _table_source(settings: Settings, table: LatencyTable | None) -> TableSource | None:
    """Source of the latency table, if an objective or the target needs one."""
    from secateur.evaluators.latency.conditions import LatencySetup
    from secateur.evaluators.latency.store import TableSource

    if not any(name.startswith("latency_") for name in (*settings.optimised, settings.space.counts)):
        return None
    of = settings.evaluator.latency or LatencySettings()
    path = of.table and located(of.table, settings.folders)
    first, *further = of.batches
    setup = LatencySetup(first, of.prompt, of.threads, of.clock, of.eager)
    return TableSource(setup, path, table, tuple(further))


def _task_plan(settings: Settings) -> TaskPlan | None:
    """The tasks that are objectives or the loss, if there are any."""
    from secateur.evaluators.tasks.task_set import TaskPlan

    of, wanted = settings.evaluator.tasks, settings.task_values
    if of is None or not wanted:
        return None
    names = tuple(dict.fromkeys(name.removeprefix(TASK).removeprefix(MARGIN) for name in wanted))
    seed, trust = settings.data_seed, settings.trust_remote_code
    directory = Path(located(of.directory, settings.folders))
    return TaskPlan(names, directory, of.samples, of.batch, seed, trust)


def _training(of: TrainingSettings, seed: int) -> Training:
    """The training of candidates up to its end."""
    from secateur.evaluators.training.settings import Training

    return Training(
        method=of.learn,
        loss=of.loss,
        tokens=of.tokens[-1],
        batch=of.batch,
        lr=of.rate,
        rank=of.rank,
        seed=seed,
        schedule="constant",
    )


def on_driver(settings: Settings, note: Say = silent) -> Settings:
    """The settings with the CPU as the device of a driver without a GPU, whose workers have some.

    Its weights are in the precision that a GPU's are in by default.
    """
    import torch

    from secateur.pruners.models.loading import precision_of

    of = settings.executor
    on_gpus = getattr(of, "gpus_per_worker", 0) > 0 and settings.device.startswith("cuda")
    if not on_gpus or torch.cuda.is_available():
        return settings
    dtype = str(precision_of(settings.dtype, torch.device("cuda"))).removeprefix("torch.")
    note(
        f"no GPU here: what workers don't build of statistics and levels is made on the CPU in {dtype}, candidates are "
        "measured on the workers' GPUs"
    )
    return settings.model_copy(update={"device": "cpu", "dtype": dtype})


def open_session(settings: Settings, say: Say = silent, table: LatencyTable | None = None) -> Session:
    """The model, its space and its data, ready to measure and prune.

    Args:
        settings: of a search.
        say: given progress, one line at a time.
        table: see `plan`.

    Raises:
        UsageError: if something in the settings does not fit the model or the texts.
    """
    from secateur.evaluators.session import Session, set_threads

    set_threads(settings.executor.threads)
    with usage_errors():
        return Session(plan(settings, table), say)


def is_sequential(settings: Settings, asked: str | None = None) -> bool:
    """True if an export takes statistics of a block from already pruned blocks; otherwise from those of the search.

    Args:
        settings: of the search.
        asked: ``sequential``, or those of the search, ``dense`` or ``expected``; None: that of the settings.

    Raises:
        UsageError: if sequential statistics are asked for, and the space's methods take the dense model's alone; or
            others are that the search did not have.
    """
    usual: str | None = settings.space.export_statistics
    searched = "expected" if usual == "expected" else "dense"
    if asked not in (None, "sequential", searched):
        raise UsageError(
            f"Expected `--calibration` sequential, or {searched} as in the search, got {asked}. Leave it out."
        )
    if usual is None and asked == "sequential":
        raise UsageError(
            f"Expected `--calibration dense` with the space {settings.space.kind}, whose statistics are the dense "
            f"model's, got {asked}. Leave it out."
        )
    return (asked or usual) == "sequential"


def reopen_session(run: Run, say: Say = silent, *, stream: Stream = "never") -> Session:
    """The session of a run, on the model and texts that it was searched with.

    Args:
        run: to continue from.
        say: given progress, one line at a time.
        stream: see `open_model`; never: a model that is pruned for good as a whole, or trained.

    Raises:
        UsageError: if they have changed, or the source of a method has.
    """
    settings = run.settings.model_copy(update={"stream": stream, "compile": "never"})
    session = open_session(settings, say, run.shape.latency)
    old = run.described("identity.content", dict[str, Any])
    new = session.facts() | recorded_sources(run.settings, run.study.about)
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        raise UsageError(
            f"Expected the model, texts and methods that {run.study.directory} was searched with, got another "
            f"{', '.join(changed)}. Restore them, or search again."
        )
    return session
