"""Command for boards of methods: ``bench``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.search.cli.option_groups import (
    LOADING,
    MEASURING,
    MODEL_HELP,
    Json,
    Option,
    Options,
    bos_asked,
    with_group,
)
from secateur.search.cli.searching import parse_seeds
from secateur.search.errors import UsageError
from secateur.search.files import read_yaml
from secateur.search.show.console import complain, open_display, show, show_json

# What is measured, by the keys of the settings; each option that is left out is as the settings file says.
ASKED: dict[str, Option] = {
    "methods": (
        Annotated[str | None, typer.Option(metavar="all|NAME,...", help="See `secateur list recipes`.")],
        None,
    ),
    "sparsities": (
        Annotated[
            str | None,
            typer.Option(
                metavar="[UNIT=]SHARE,...", help="Shares to remove: 0.5,0.7 or weights=0.5,blocks=0.2."
            ),
        ],
        None,
    ),
    "calibration": (
        Annotated[
            str | None,
            typer.Option(
                metavar="equal|published",
                help="Calibration tokens: equal ones, each paper's, or both: equal,published.",
            ),
        ],
        None,
    ),
    "calibration_text": (Annotated[str | None, typer.Option(help="Calibration text of all methods.")], None),
    "contrast_text": (
        Annotated[str | None, typer.Option(help="Second calibration text, of methods that compare two.")],
        None,
    ),
    "calibration_tokens": (Annotated[int | None, typer.Option(help="Calibration tokens at `equal`.")], None),
    "calibration_window": (Annotated[int | None, typer.Option(help="Tokens of their windows.")], None),
    "text": (
        Annotated[
            list[str] | None,
            typer.Option(
                help="docs, a file, a directory or a hub data set to measure on; may be given again."
            ),
        ],
        None,
    ),
    "seeds": (
        Annotated[str | None, typer.Option(metavar="0,1,...", help="Seeds of windows and draws.")],
        None,
    ),
    "tasks": (
        Annotated[
            str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-eval, the same samples for all.")
        ],
        None,
    ),
    "task_dir": (
        Annotated[Path | None, typer.Option(metavar="DIR", help="Directory of the tasks' files.")],
        None,
    ),
    "samples": (Annotated[int | None, typer.Option(help="Samples of each task; default: all.")], None),
    **{key: (annotation, None) for key, (annotation, _) in {**MEASURING, **LOADING}.items() if key != "text"},
}


@with_group("asked", ASKED)
def bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...|SETTINGS.yaml", help=f"{MODEL_HELP[:-1]}; or a settings file."),
    ],
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the run; default: runs/NAME.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers of a Ray on this machine, as -o executor.kind=ray.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", metavar="KEY.PATH=VALUE", help="Override a setting.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of the tables; default: METHODS.md in the run.")
    ] = None,
    json: Json = False,
    *,
    asked: Options,
) -> None:
    """Measure all pruning methods on models and write their tables. The same command continues; Ctrl-C is safe."""
    from secateur.search import app as rooms
    from secateur.search.board.settings import board_settings, workers_words
    from secateur.search.show.board import files_of

    file = Path(models[0]) if len(models) == 1 and models[0].endswith((".yaml", ".yml")) else None
    raw = {"models": models} if file is None else _read(file)
    settings = board_settings({**raw, **_values(asked)}, [*workers_words(workers), *(override or ())])
    directory = run or Path("runs") / (file.stem if file else "bench")
    folders = [Path.cwd()] if file is None else [file.parent.absolute(), Path.cwd()]
    with open_display() as display:
        try:
            board = rooms.bench(settings, directory, folders=folders, markdown=markdown, say=display.say)
        except KeyboardInterrupt:
            complain(f"Continue with: {shlex.join(['secateur', *sys.argv[1:]])}", "note")
            raise
    written = files_of(directory, markdown)
    if json:
        show_json({"run": str(directory), **board.to_json(), "files": [str(path) for path in written]})
        return
    n_found = sum(x.measurement.infeasible is None for x in board.trials)
    show(f"{n_found:,} cells measured, {len(board.trials) - n_found:,} refused or failed: {directory}")
    for path in written:
        show(str(path))


def _read(file: Path) -> dict[str, Any]:
    raw = read_yaml(file)
    if not isinstance(raw, dict):
        raise UsageError(f"Expected keys and values in {file}, got {type(raw).__name__}.")
    return raw


def _values(asked: Options) -> dict[str, Any]:
    """Settings that the options name."""
    given = {key: x for key, x in asked.items() if x is not None}
    for key in ("methods", "sparsities", "calibration", "tasks"):
        if key in given:
            given[key] = _listed(given[key])
    if given.get("methods") == ["all"]:
        given["methods"] = "all"
    if "seeds" in given:
        given["seeds"] = parse_seeds(given["seeds"])
    if "bos" in given:
        given["bos"] = bos_asked(given["bos"])
    if "task_dir" in given:
        given["task_dir"] = str(given["task_dir"])
    return given


def _listed(text: str) -> Sequence[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
