"""Commands to begin with: ``init``, ``schema``."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from secateur.search.cli.option_groups import MODEL_HELP, Json, completing
from secateur.search.errors import UsageError
from secateur.search.show.console import show, show_facts, show_json


def _preset_names() -> Iterable[str]:
    from secateur.search.settings.presets import PRESETS

    return PRESETS


def init(
    to: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="New settings file; default: PRESET.yaml.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What to begin with; without one they are listed.",
            autocompletion=completing(_preset_names),
        ),
    ] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "tiny",
    json: Json = False,
) -> None:
    """Write a settings file with comments, for one of a few wishes."""
    from secateur.search.settings.presets import PRESETS, preset_text

    if preset is None:
        rows = {name: row.summary for name, row in PRESETS.items()}
        show_json(rows) if json else show_facts(rows)
        return
    text = preset_text(preset, model)
    path = to or Path(f"{preset}.yaml")
    if path.exists():
        raise UsageError(f"Expected a new file, got {path}, which exists. Name another one.")
    path.write_text(text, encoding="utf-8")
    if json:
        show_json({"file": str(path), "preset": preset})
        return
    where = shlex.quote(str(path))
    show(f"{path}\n\nNext:  secateur search {where} --dry-run\n       secateur search {where}")


def schema() -> None:
    """Print the JSON schema of settings files, with the keys of every kind, for editors."""
    from secateur.search.settings.schema import settings_schema

    show_json(settings_schema())
