"""Latency of models on this machine: tables for searches, and whole models beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import Say, silent, usage_errors
from secateur.search.errors import UsageError
from secateur.spaces.latency import at_batch

if TYPE_CHECKING:
    from secateur.evaluators.latency.conditions import LatencySetup
    from secateur.evaluators.latency.rounds import Timing
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
        conditions: batch, prompt, threads and clock; see `setups_of`.
        rounds: at least ten.
        say: given progress, one line at a time.
        loading: of `load_model`: dtype, device, trust_remote_code.

    Returns:
        The table, of several batch sizes all of them in one, and the file that it is kept in; of several the
        directory of their files.

    Raises:
        UsageError: if the model or the conditions are wrong.
    """
    from secateur.evaluators.latency.store import MeasuredTable, save_table
    from secateur.evaluators.latency.table import measure_table
    from secateur.pruners.models.discover import dissect

    setups, loaded = _open(model, conditions, rounds, say, loading)
    anatomy, tables, paths = dissect(loaded.model), [], list[Path]()
    for setup in setups:
        if len(setups) > 1:
            say(f"batch {setup.batch}")
        tables.append(measure_table(anatomy, setup, rounds=rounds, say=say))
        paths.append(save_table(tables[-1]))
    return MeasuredTable.joined(tables), paths[0] if len(paths) == 1 else paths[0].parent


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
        ``conditions`` and ``rounds``; and in ``phases``, by phase (of further batch sizes ``decode@8``) and model,
        medians ``ms`` and ``cpu_ms``, ``ratio`` to the dense model in the same rounds (median and quartiles), and
        ``predicted_ms``, None unless there is a table of the dense model and the other one is an export of it.

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
    setups, first = _open(dense, conditions, rounds, say, loading)
    loaded = {dense: first.model}
    loaded |= {name: _open(name, conditions, rounds, say, loading)[1].model for name in names[1:]}
    anatomy = dissect(first.model)
    kept = {dense: all_of(anatomy)} | {name: kept_in(name, anatomy, first.fingerprint) for name in names[1:]}

    def row(phase: Any, name: str, timing: Timing, measured: MeasuredTable | None) -> dict[str, Any]:
        blocks, predicted = kept[name], None
        if measured is not None and blocks is not None:
            predicted = predicted_ms(measured.table, phase, blocks)
        return {
            "ms": timing.ms.median,
            "cpu_ms": timing.cpu_ms.median,
            "ratio": asdict(timing.ratio),
            "predicted_ms": predicted,
        }

    phases = dict[str, Any]()
    for setup in setups:
        at = "" if setup is setups[0] else f", batch {setup.batch}"
        say(f"timing {len(names)} models in turns, {rounds} rounds{at}")
        measured, further = load_table(anatomy, setup), None if setup is setups[0] else setup.batch
        for phase, timings in time_models(loaded, setup, rounds=rounds).items():
            rows = {name: row(phase, name, timings[name], measured) for name in names}
            phases[at_batch(phase, further)] = rows
    found = conditions_of(anatomy, setups[0])
    if len(setups) > 1:
        found["batch"] = [setup.batch for setup in setups]
    return {"conditions": found, "rounds": rounds, "phases": phases}


def _open(
    model: str, conditions: Mapping[str, Any], rounds: int, say: Say, loading: Mapping[str, Any]
) -> tuple[list[LatencySetup], LoadedModel]:
    from secateur.evaluators.latency.conditions import setups_of
    from secateur.evaluators.latency.rounds import check_rounds
    from secateur.pruners.models.loading import load_model

    check_rounds(rounds)
    setups = setups_of(conditions)  # refuses what is out of range before anything is loaded
    say(f"loading {model}")
    return setups, load_model(model, say=say, **loading)
