"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
TrialNumber = Annotated[
    int | None, typer.Argument(metavar="TRIAL", help="Number of a trial, instead of bounds.")
]
Options = dict[str, Any]  # of a group
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
