"""Latency of models on this machine: tables for searches, and whole models beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import Say, silent, usage_errors
from secateur.search.errors import UsageError

if TYPE_CHECKING:
    from secateur.evaluators.latency.conditions import LatencySetup
    from secateur.evaluators.latency.store import MeasuredTable
    from secateur.pruners.models.loading import LoadedModel


@usage_errors()
def measure_latency(
    model: str,
    conditions: Mapping[str, Any],
    *,
    rounds: int = 20,
    say: Say = silent,
    **loading: Any,
) -> tuple[MeasuredTable, Path]:
    """Measure a table of a model's sub-layers, and keep it in the user's cache for searches on this machine.

    Args:
        model: see `load_model`.
        conditions: batch, prompt, threads and clock; see `LatencySetup`.
        rounds: at least ten.
        say: given progress, one line at a time.
        loading: of `load_model`: dtype, device, trust_remote_code.

    Returns:
        The table, and the file that it is kept in.

    Raises:
        UsageError: if the model or the conditions are wrong.
    """
    from secateur.evaluators.latency.store import save_table
    from secateur.evaluators.latency.table import measure_table
    from secateur.pruners.models.discover import dissect

    setup, loaded = _open(model, conditions, rounds, say, loading)
    measured = measure_table(dissect(loaded.model), setup, rounds=rounds, say=say)
    return measured, save_table(measured)


@usage_errors()
def compare_latency(
    models: Sequence[str],
    dense: str,
    conditions: Mapping[str, Any],
    *,
    rounds: int = 20,
    say: Say = silent,
    **loading: Any,
) -> dict[str, Any]:
    """Time whole models in turns with the dense one, beside predictions from the dense one's table.

    Args:
        models: exported directories, or any models; see `load_model`.
        dense: the model to compare with.
        conditions, rounds, say, loading: see `measure_latency`.

    Returns:
        ``conditions`` and ``rounds``; and in ``phases``, by phase and model, medians ``ms`` and ``cpu_ms``, ``ratio``
        to the dense model in the same rounds (median and quartiles), and ``predicted_ms``, None unless there is a table
        of the dense model and the other one is an export of it.

    Raises:
        UsageError: if a model or the conditions are wrong.
    """
    from secateur.evaluators.latency.conditions import conditions as conditions_of
    from secateur.evaluators.latency.models import all_of, kept_in, predicted_ms, time_models
    from secateur.evaluators.latency.store import load_table
    from secateur.pruners.models.discover import dissect

    names = list(dict.fromkeys([dense, *models]))
    if len(names) == 1:
        raise UsageError(f"Expected models to compare with {dense}, got none but itself. Name another.")
    setup, first = _open(dense, conditions, rounds, say, loading)
    loaded = {dense: first.model}
    loaded |= {name: _open(name, conditions, rounds, say, loading)[1].model for name in names[1:]}
    anatomy = dissect(first.model)
    measured = load_table(anatomy, setup)
    say(f"timing {len(names)} models in turns, {rounds} rounds")
    timings = time_models(loaded, setup, rounds=rounds)
    kept = {dense: all_of(anatomy)} | {name: kept_in(name, anatomy, first.fingerprint) for name in names[1:]}

    def row(phase: Any, name: str) -> dict[str, Any]:
        timing, blocks = timings[phase][name], kept[name]
        predicted = None
        if measured is not None and blocks is not None:
            predicted = predicted_ms(measured.table, phase, blocks)
        return {
            "ms": timing.ms.median,
            "cpu_ms": timing.cpu_ms.median,
            "ratio": asdict(timing.ratio),
            "predicted_ms": predicted,
        }

    return {
        "conditions": conditions_of(anatomy, setup),
        "rounds": rounds,
        "phases": {phase: {name: row(phase, name) for name in names} for phase in timings},
    }


def _open(
    model: str, conditions: Mapping[str, Any], rounds: int, say: Say, loading: Mapping[str, Any]
) -> tuple[LatencySetup, LoadedModel]:
    from secateur.evaluators.latency.conditions import LatencySetup
    from secateur.evaluators.latency.rounds import check_rounds
    from secateur.pruners.models.loading import load_model

    check_rounds(rounds)
    setup = LatencySetup(**conditions)  # refuses what is out of range before anything is loaded
    say(f"loading {model}")
    return setup, load_model(model, say=say, **loading)
