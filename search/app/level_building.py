"""Level store of a search: built by the workers of a cluster, each some blocks, or by the driver."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import Say
from secateur.search.errors import UsageError
from secateur.search.executors.registry import EXECUTORS
from secateur.search.settings.settings import Settings

if TYPE_CHECKING:
    from secateur.evaluators.forecast.prospect import Prospect
    from secateur.evaluators.session import Session

WORTH_WORKERS = 1e11
"""Multiply-accumulates of the calibration set's pass from which on workers build levels: some seconds on a core, about
as long as they take to start."""


def build_levels(settings: Settings, session: Session, levels: Path, say: Say) -> None:
    """Build the level store unless it is there; continue an unfinished one with its missing blocks.

    Workers build stores from the dense model's activations, see `level_setups`; the driver does what is left.

    Raises:
        UsageError: if the metric is a formula that gives no ranking of a layer's weights.
        LevelStoreError: if there is no room on the disk.
    """
    from secateur.pruners.formulas.evaluate import FormulaError

    n_blocks = len(session.anatomy.blocks)
    say("building levels")
    try:
        _by_workers(settings, session, levels, say)
        session.build_levels(levels, lambda index: say(f"building levels {index + 1}/{n_blocks}"))
    except FormulaError as error:
        raise UsageError(f"{error} Choose another `space.metric`, or protect this layer.") from error


def _by_workers(settings: Settings, session: Session, levels: Path, say: Say) -> None:
    row = EXECUTORS[settings.executor.kind]
    if row.build_by_workers is None or not spread_over_workers(settings, session):
        return
    from secateur.evaluators.level_setup import level_setups

    n_blocks = len(session.anatomy.blocks)
    for setup in level_setups(session, levels, **of_workers(settings)):
        told = f"{setup.doing} by workers"
        row.build_by_workers(settings.executor, setup, lambda n: say(f"{told} {n}/{n_blocks}"))  # noqa: B023  # called within


def spread_over_workers(settings: Settings, of: Session | Prospect) -> bool:
    """True if workers, where there are several, build stores of this plan by blocks."""
    work = of.dense.shape.macs_per_token * of.plan.calibration_tokens
    return EXECUTORS[settings.executor.kind].build_by_workers is not None and work >= WORTH_WORKERS


def of_workers(settings: Settings) -> dict[str, Any]:
    """Threads, devices and share of a GPU of a worker, for its setup."""
    of = settings.executor
    gpus = of.gpus_per_worker
    return {
        "threads": of.worker_threads,
        "spread": gpus > 1 or settings.device == "spread",
        "device": settings.device,
        "share": gpus if 0 < gpus < 1 else 1.0,
    }
