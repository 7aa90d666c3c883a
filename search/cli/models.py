"""Commands about any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.search.cli.option_groups import CONDITIONS, LOADING, with_group
from secateur.search.cli.options import Json, Options
from secateur.search.errors import UsageError
from secateur.search.show.answers import open_display, show_facts
from secateur.search.show.console import show_json


@with_group("loading", LOADING)
def evaluate(
    model: Annotated[str, typer.Argument(help="tiny, a hub id, a directory or a .gguf file.")],
    text: Annotated[str, typer.Option(help="docs, a file, a directory or a hub data set.")] = "docs",
    tokens: Annotated[int, typer.Option(help="A multiple of the window.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens that the model sees at once.")] = 512,
    tasks: Annotated[str, typer.Option(metavar="NAME,...", help="Tasks of lm-eval.")] = "",
    task_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Of the tasks' files.")] = None,
    samples: Annotated[int | None, typer.Option(help="Of each task; default: all.")] = None,
    json: Json = False,
    *,
    loading: Options,
) -> None:
    """Perplexity of a model, how many of its weights are zero, and its accuracy in tasks."""
    from secateur.search import app as rooms

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with open_display() as display:
        facts = rooms.evaluate(
            model,
            text=text,
            n_tokens=tokens,
            window=window,
            tasks=rooms.tasks_in(names, task_dir, samples),
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
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="As for evaluate.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="Time whole models in turns with this one, in place of a table."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="At least 10.")] = 20,
    json: Json = False,
    *,
    conditions: Options,
    loading: Options,
) -> None:
    """Measure a table of a model's sub-layers, which latency objectives need; or compare whole models."""
    from secateur.search import app as rooms
    from secateur.search.show.timing import show_comparison, show_table

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
