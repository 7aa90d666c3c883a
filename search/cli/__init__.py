"""The command ``secateur``: a thin skin over `app`. Results go to stdout, progress and errors to stderr.

Commands import what they need when they run: `secateur --help` is quick, and reading a run needs no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from secateur.search.cli.benching import bench
from secateur.search.cli.comparing import compare
from secateur.search.cli.doctor import doctor
from secateur.search.cli.lists import list_
from secateur.search.cli.models import evaluate, latency
from secateur.search.cli.planning import plan
from secateur.search.cli.pushing import push
from secateur.search.cli.recipes import prune, recipe
from secateur.search.cli.results import export, front, order, pick, recover, report
from secateur.search.cli.searching import dashboard, search, status
from secateur.search.cli.starting import init, schema
from secateur.search.errors import STATUSES
from secateur.search.show.console import run_command, show

COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "plan": plan,
    "search": search,
    "front": front,
    "pick": pick,
    "export": export,
    "push": push,
    "recipe": recipe,
    "prune": prune,
    "recover": recover,
    "compare": compare,
    "bench": bench,
    "status": status,
    "dashboard": dashboard,
    "report": report,
    "order": order,
    "evaluate": evaluate,
    "latency": latency,
    "list": list_,
    "doctor": doctor,
    "schema": schema,
}

COMPLETE = "_SECATEUR_COMPLETE"
"""Environment variable by which typer's completion scripts ask."""


def main() -> None:
    """Entry point of the console script."""
    if COMPLETE in os.environ:  # a shell asks for the next word, or for the script that makes it ask
        typer.main.get_command(_app())(prog_name="secateur")
    sys.exit(run_command(lambda: _dispatch(sys.argv[1:])))


def _dispatch(arguments: list[str]) -> None:
    """Parse and run, without typer's own handling of errors and interrupts: `run_command` has one for all."""
    command = typer.main.get_command(_app())
    with command.make_context("secateur", arguments or ["--help"]) as context:
        command.invoke(context)


def _app() -> typer.Typer:
    app = typer.Typer(
        epilog="Exit status: " + "; ".join(f"{number} {what}" for number, what in STATUSES.items()) + ".",
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_secateur)
    for name, command in COMMANDS.items():
        app.command(name)(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"secateur {metadata.version('secateur')}")
        raise typer.Exit


def _secateur(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Search for the best way to prune a language model."""
