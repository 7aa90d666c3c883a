"""Command for what others will take: ``plan``."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from secateur.search.cli.option_groups import Json
from secateur.search.errors import UsageError
from secateur.search.show.console import open_display, show, show_json


def plan(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="SETTINGS.yaml|MODEL", help="Settings file, or a model with default settings."
        ),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", metavar="KEY.PATH=VALUE", help="Override a setting.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="cuda:141GB,...", help="Devices that are only thought of, with their memory."),
    ] = None,
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME", help="Plan `prune` of the model by this recipe, in place of a search."
        ),
    ] = None,
    sparsity: Annotated[float, typer.Option(help="Share that --prune removes.")] = 0.5,
    timing: Annotated[
        bool, typer.Option("--time/--no-time", help="Time a block of this shape for about a second.")
    ] = True,
    json: Json = False,
) -> None:
    """Forecast memory, disk, tokens and time from a model's config.json; its weights are not needed."""
    from secateur.search.app.forecasting import planned
    from secateur.search.settings.settings import load_settings
    from secateur.search.show.forecast import full_lines, refusal

    is_file = subject is not None and subject.endswith((".yaml", ".yml"))
    named = [] if subject is None or is_file else [f"model={dumps(subject)}"]
    settings = load_settings(Path(str(subject)) if is_file else None, [*named, *(override or ())])
    directory = Path("runs") / Path(str(subject) if is_file else settings.model).stem
    with open_display() as display:
        found = planned(
            settings, prune, sparsity, device, timing=timing, directory=directory, say=display.say
        )
    if json:
        show_json(found.to_json())
    else:
        for line in full_lines(found):
            show(line)
    problem = refusal(found)
    if problem:
        raise UsageError(problem)
