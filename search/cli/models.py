"""Commands for any model: ``evaluate``, ``latency``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.search.cli.option_groups import (
    CONDITIONS,
    LOADING,
    MEASURING,
    MODEL_HELP,
    STREAMING,
    Json,
    ModelName,
    Options,
    bos_asked,
    with_group,
)
from secateur.search.errors import UsageError
from secateur.search.show.console import open_display, show_facts, show_json


@with_group("measuring", MEASURING)
@with_group("loading", {**LOADING, **STREAMING})
def evaluate(
    model: ModelName,
    tasks: Annotated[str, typer.Option(metavar="NAME,...", help="Tasks of lm-eval.")] = "",
    task_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the tasks' files.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of each task; default: all.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the files of an export first.")] = False,
    json: Json = False,
    *,
    measuring: Options,
    loading: Options,
) -> None:
    """Measure a model: perplexity, share of zero weights, accuracy in tasks."""
    from secateur.search import app as rooms

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with open_display() as display:
        facts = rooms.evaluate(
            model,
            text=measuring["text"],
            n_tokens=measuring["tokens"],
            window=measuring["window"],
            bos=bos_asked(measuring["bos"]),
            allow_long_windows=measuring["allow_long_windows"],
            tasks=rooms.tasks_in(names, task_dir, samples, trusted=loading["trust_remote_code"]),
            verify=verify,
            say=display.say,
            **loading,
        )
    if json:
        show_json(facts)
    else:
        show_facts({name: f"{v:.4f}" if isinstance(v, float) else str(v) for name, v in facts.items()})


@with_group("loading", LOADING)
@with_group("conditions", CONDITIONS)
def latency(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    against: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="Compare whole models with this one, in place of a table."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of measurements, at least 10.")] = 20,
    json: Json = False,
    *,
    conditions: Options,
    loading: Options,
) -> None:
    """Measure a model's latencies by sub-layer, for latency objectives; or compare whole models."""
    from secateur.search import app as rooms
    from secateur.search.show.latency import show_comparison, show_table

    if against is None and len(models) > 1:
        raise UsageError(
            f"Expected one model for a table, got {len(models)}. Compare several with --against."
        )
    how: dict[str, Any] = {"rounds": rounds, **loading}
    with open_display() as display:
        if against is None:
            measured, path = rooms.measure_latency(models[0], conditions, say=display.say, **how)
        else:
            found = rooms.compare_latency(models, against, conditions, say=display.say, **how)
    if against is not None:
        show_json(found) if json else show_comparison(found)
    else:
        show_json(measured.to_json()) if json else show_table(measured.to_json(), str(path))
