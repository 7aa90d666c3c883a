"""The rooms behind a search: the model, its space and its data, made from settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from secateur.search.errors import UsageError
from secateur.search.run import Run
from secateur.search.settings import Settings

if TYPE_CHECKING:
    from secateur.evaluators.workbench import Plan, Workbench

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


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


def open_bench(settings: Settings, say: Say = silent) -> Workbench:
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


def check_content(view: Run, bench: Workbench) -> None:
    """See that a run's model and texts are those that it was searched with.

    Raises:
        UsageError: if not.
    """
    old, new = view.study.about.identity["content"], bench.facts()
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        raise UsageError(
            f"Expected the model and texts that {view.study.directory} was searched with, got another "
            f"{', '.join(changed)}. Restore them, or search again."
        )
