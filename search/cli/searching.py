"""Commands about a search that runs."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.search.cli.options import Json, RunDir
from secateur.search.mirror.address import masked
from secateur.search.show.answers import open_display, show_facts, show_front, watch_status
from secateur.search.show.console import complain, show, show_json, show_line

if TYPE_CHECKING:
    from secateur.search.executor import Executor
    from secateur.search.loop.loop import Search


def search(
    settings: Annotated[
        Path | None, typer.Argument(metavar="[SETTINGS.yaml]", help="Without: defaults.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", metavar="KEY.PATH=VALUE", help="Override.")
    ] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="Of the run; default: runs/NAME.")] = None,
    json: Json = False,
) -> None:
    """Start a search, or continue where it stopped. Ctrl-C is safe."""
    from secateur.search import app as rooms
    from secateur.search.loop.interrupt import Interrupt

    loaded = rooms.load_settings(settings, override or ())
    directory = run or Path("runs") / (settings.stem if settings else Path(loaded.model).stem)
    words = [str(settings)] * (settings is not None) + [x for o in override or () for x in ("-o", o)]
    again = masked(shlex.join(["secateur", "search", *words, "--run", str(directory)]))
    with open_display(loaded) as display, Interrupt(display.note, again) as interrupt:

        def on_ready(loop: Search, executor: Executor) -> None:
            interrupt.watch(loop)
            display.watch(loop.baselines, executor, lambda: loop.notes)

        try:
            outcome = rooms.search(
                loaded, directory, observers=[display, interrupt], say=display.say, on_ready=on_ready
            )
        except KeyboardInterrupt:
            display.note(f"Continue with: {again}")
            raise
    view = rooms.open_run(directory)
    if outcome.reason == "stopped":
        complain(f"Stopped. Continue with: {again}", "note")
    if view.front():
        show_front(view, json, {"ended": outcome.reason, "spent": asdict(outcome.spent)})
    elif json:
        show_json(
            {"run": str(directory), "ended": outcome.reason, "spent": asdict(outcome.spent), "front": []}
        )
    if view.front() and not json:
        where = shlex.quote(str(directory))
        bound = f"--sparsity {max(t.measurement.values.get('sparsity', 0.0) for t in view.front()):.2g}"
        show(f"\nNext:  secateur report {where}\n       secateur pick {where} {bound}")
        show(f"       secateur export {where} {bound} --to {shlex.quote(str(directory / 'model'))}")


def status(
    run: RunDir,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look on until it ends; with --json a line an update.")
    ] = False,
    every: Annotated[float, typer.Option(help="Seconds between updates of --watch.")] = 2.0,
    json: Json = False,
) -> None:
    """How far a search is."""
    if watch:
        watch_status(run, every, json)
        return
    from secateur.search.results.run import open_run
    from secateur.search.show.summary import status_lines, summary

    view = open_run(run)
    facts = summary(view)
    if json:
        show_json(facts)
    else:
        show_facts(status_lines(facts))


def dashboard(
    run: RunDir,
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
) -> None:
    """Look at a run in a browser, with optuna-dashboard. Ctrl-C ends it."""
    from secateur.search.mirror.dashboard import serve_dashboard
    from secateur.search.results.run import open_run

    with contextlib.suppress(KeyboardInterrupt):
        serve_dashboard(open_run(run), host, port, lambda address: show_line(f"{address}  (Ctrl-C ends it)"))
