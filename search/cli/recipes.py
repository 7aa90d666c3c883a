"""Commands for recipes: ``recipe``, ``prune``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from secateur.search.cli.option_groups import (
    LOADING,
    MEASURING,
    STREAMING,
    Anyway,
    Bounds,
    ExportFormat,
    Json,
    ModelName,
    NewDir,
    Options,
    RunDir,
    TrialNumber,
    bos_asked,
    choose,
    completing,
    with_bounds,
    with_group,
    with_limits,
)
from secateur.search.cli.results import show_export, show_foreseen
from secateur.search.errors import UsageError
from secateur.search.results.pick import parse_bounds
from secateur.search.show.console import open_display, show, show_json


def _recipe_names() -> Iterable[str]:
    from secateur.spaces.recipe.known import KNOWN

    return KNOWN


@with_bounds
def recipe(
    run: RunDir,
    trial: TrialNumber = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New file; default: print the recipe.")
    ] = None,
    *,
    json: Json = False,
    bounds: Bounds,
) -> None:
    """Write a trial of any search as a file that `secateur prune` runs on other models; default: lowest loss."""
    from secateur.search.app.found import best_of, recipe_of, written
    from secateur.search.results.run import open_run

    view = open_run(run)
    asked = trial is not None or any(bounds.values())
    chosen = choose(view, trial, bounds) if asked else best_of(view)
    text = written(view, chosen)
    if to is not None:
        if to.exists():
            raise UsageError(f"Expected a new file, got {to}, which exists. Name another one.")
        to.write_text(text, encoding="utf-8")
    if json:
        document = recipe_of(view, chosen).model_dump(mode="json")
        show_json({"run": str(run), "trial": chosen.number, **document, "file": to and str(to)})
    else:
        show(text.rstrip() if to is None else f"trial {chosen.number}: {to}")


@with_limits
@with_group("measuring", MEASURING)
@with_group("loading", LOADING | STREAMING)
def prune(  # noqa: PLR0913  # options of a command
    model: ModelName,
    to: NewDir,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="Recipe file, or a name of `secateur list recipes`; default: equal blocks for a stock class.",
            autocompletion=completing(_recipe_names),
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share to prune, in [0, 1], of the weights or of the blocks' parameters; default: see the recipe."
        ),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Calibration text of a published recipe; default: docs.")
    ] = None,
    contrast: Annotated[
        str | None, typer.Option(help="Second calibration text, of a published recipe that compares two.")
    ] = None,
    form: ExportFormat = None,
    anyway: Anyway = False,
    json: Json = False,
    *,
    limits: Bounds,
    measuring: Options,
    loading: Options,
) -> None:
    """Prune a model by a recipe, measure it, and write a directory that stock transformers loads."""
    from secateur.search import app as rooms
    from secateur.search.app.beside_truth import beside_truth
    from secateur.search.app.forecast_prune import forecast_prune
    from secateur.search.app.forecasting import foretold, stream_by
    from secateur.search.app.recipe_file import file_for

    bounds = parse_bounds(limits) if any(limits.values()) else ()
    if bounds and sparsity is not None:
        raise UsageError("Expected `--sparsity` or limits such as `--max-params`, got both. Leave one out.")
    file, chosen = file_for(recipe, sparsity, calibration, form, bounded=bool(bounds), contrast=contrast)
    measuring["bos"], stream = bos_asked(measuring["bos"]), loading.pop("stream")
    with open_display() as display:
        if chosen:
            display.note(chosen)
        forecast = partial(
            forecast_prune,
            file,
            model,
            tokens=measuring["tokens"],
            window=measuring["window"],
            loading=loading,
            stream=stream,
            to=to,
        )
        found = foretold(lambda timing: forecast(timing=timing), display.note, anyway=anyway)
        with beside_truth(found) as filled:
            summary = rooms.prune(
                file,
                model,
                to,
                **measuring,
                form=form,
                bounds=bounds,
                stream=stream_by(found, stream),
                loading=loading,
                say=display.say,
            )
            filled.directories += [] if summary.already else [summary.directory]
    if json:
        show_json({**vars(summary), "directory": str(summary.directory), "recipe": dict(file.form)})
    else:
        show_export(summary, "model")
        show_foreseen(summary.directory)
