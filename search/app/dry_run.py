"""Dry run of a search: everything that is checked before one begins, and what it would then do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.about import plugin_versions
from secateur.search.app.bounded import target_lines
from secateur.search.app.exporting import LEVELS
from secateur.search.app.forecast_work import most_tokens
from secateur.search.app.forecasting import forecast_before, stream_by
from secateur.search.app.searching import as_before, prepared
from secateur.search.app.session import Say, silent
from secateur.search.mirror.address import check_storage, masked, refuse_password
from secateur.search.settings.settings import Settings
from secateur.search.show.forecast import place_lines, time_line
from secateur.search.study.about import ABOUT, check_directory
from secateur.search.study.state import LOG, STATE
from secateur.search.study.study import MEASUREMENTS, SETTINGS, Study
from secateur.search.tracking.trackers import check_trackers

if TYPE_CHECKING:
    from secateur.evaluators.session import Session


def dry_run(settings: Settings, directory: Path, say: Say = silent) -> dict[str, Any]:
    """Outline of a search before it runs; the model is loaded, since its parts are found by running a few tokens.

    Args:
        settings: of the search.
        directory: of the run; nothing is written there, or anywhere.
        say: given progress, one line at a time.

    Returns:
        Plain values: ``model``, ``space``, ``targets``, ``baselines``, ``controller``, ``budget``, ``tokens`` (of the
        search, at most), ``data`` by part, ``executor``, ``run``, ``files``.

    Raises:
        UsageError: if the search would be refused.
    """
    refuse_password(settings.storage)
    check_trackers(settings.trackers)
    notes = check_storage(settings.storage)
    settings = as_before(settings, directory)
    forecast = forecast_before(
        settings, directory, silent
    )  # refuses what can't fit before the model is loaded
    settings, session, about, controller = prepared(
        settings,
        directory,
        plugin_versions(settings),
        say,
        silent,
        stream_by(forecast, settings.stream),
    )
    check_directory(directory, about.identity)
    known = len(Study.open(directory).trials) if (directory / ABOUT).is_file() else 0
    database = [masked(settings.storage)] if settings.storage else []
    return {
        "model": _model(session),
        "space": _space(settings, session),
        "targets": [line.removeprefix("target: ") for line in target_lines(settings, session.dense.shape)]
        or list(session.space.targets),
        "baselines": [*session.space.baselines()],
        "controller": {
            "kind": settings.controller.kind,
            "measurements before a result": controller.n_measurements,
        },
        "budget": settings.budget.model_dump(exclude_none=True),
        "tokens": most_tokens(settings.budget, session.plan.fidelities[:-1], len(session.space.baselines())),
        **({} if forecast is None else {"forecast": {**place_lines(forecast), "time": time_line(forecast)}}),
        "data": _data(session),
        "executor": {"kind": settings.executor.kind},
        "run": f"{directory}, {'continued after' if known else 'new:'} {known:,} measurements",
        "files": [SETTINGS, ABOUT, MEASUREMENTS, STATE, LOG, f"{LEVELS}/", *database],
        **({"notes": notes} if notes else {}),
    }


def _model(session: Session) -> dict[str, Any]:
    n_params = session.dense.shape.n_params
    weight = next(session.anatomy.linears).weight
    return {
        "name": session.plan.model,
        "family": session.anatomy.family,
        "blocks": len(session.anatomy.blocks),
        "parameters": n_params,
        "bytes in memory": n_params * weight.element_size(),
        "dtype": session.dense.dtype,
    }


def _space(settings: Settings, session: Session) -> dict[str, Any]:
    """Kind, number of slots, and the order of magnitude of the number of candidates, targets left out of account."""
    found = session.space.parameters()
    if not found:
        return {"kind": settings.space.kind}
    digits = sum(math.log10(parameter.high - parameter.low + 1) for parameter in found)
    return {"kind": settings.space.kind, "slots": len(found), "candidates": f"at most 10^{digits:.0f}"}


def _data(session: Session) -> dict[str, Any]:
    of = session.plan
    search = [fidelity.n_tokens for fidelity in of.fidelities[:-1]]
    return {
        "calibration": f"{of.calibration}, {of.calibration_tokens:,} tokens",
        **({} if of.contrast is None else {"contrast": f"{of.contrast}, as many tokens"}),
        "search": f"{of.search}, {' / '.join(f'{n:,}' for n in search)} tokens",
        "test": f"{of.test}, {of.fidelities[-1].n_tokens:,} tokens",
        "window": of.window,
    }
