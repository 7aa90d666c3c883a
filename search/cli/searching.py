"""Commands for a search in progress: ``search``, ``status``, ``dashboard``."""

from __future__ import annotations

import contextlib
import math
import shlex
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.search.cli.option_groups import Anyway, Bounds, Json, RunDir, with_limits
from secateur.search.errors import DONE, STOPPED, UsageError
from secateur.search.mirror.address import masked
from secateur.search.show.console import complain, open_display, show, show_facts, show_json, show_line
from secateur.search.study.about import ABOUT
from secateur.search.study.state import RunState, read_state, state_words

if TYPE_CHECKING:
    from secateur.search.executor import Executor
    from secateur.search.loop.loop import Outcome, Search
    from secateur.search.results.run import Run
    from secateur.search.settings.settings import Settings


def _next_bound(view: Run) -> str:
    """Bound that the smallest trial of the front meets, for the command of the next step."""
    front = [trial.measurement.values for trial in view.front()]
    if view.structured:
        share = min(values["params"] for values in front) / view.shape.n_params
        return f"--max-params {math.ceil(share * 100) / 100:.2f}x"
    return f"--sparsity {max(values.get('sparsity', 0.0) for values in front):.2g}"


@with_limits
def search(
    settings: Annotated[
        Path | None, typer.Argument(metavar="SETTINGS.yaml", help="Settings file; default: none.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", metavar="KEY.PATH=VALUE", help="Override a setting.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the run; default: runs/NAME.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0,1,...", help="A search for each seed, in DIR-seed0, DIR-seed1, ..."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be done: load the model, measure and write nothing."),
    ] = False,
    anyway: Anyway = False,
    json: Json = False,
    *,
    limits: Bounds,
) -> None:
    """Start a search, or continue one where it stopped. Ctrl-C is safe."""
    from secateur.search import app as rooms
    from secateur.search.app.bounded import bounded
    from secateur.search.show.front_table import show_front

    loaded = bounded(rooms.load_settings(settings, override or ()), limits)
    directory = run or Path("runs") / (settings.stem if settings else Path(loaded.model).stem)
    words = [str(settings)] * (settings is not None) + [x for o in override or () for x in ("-o", o)]
    words += ["--run", str(directory)] + (["--seeds", seeds] if seeds is not None else [])
    words += [x for name, text in limits.items() if text is not None for x in (f"--{name}", text)]
    again = masked(shlex.join(["secateur", "search", *words]))
    if dry_run:
        with open_display(loaded) as display:
            planned = rooms.dry_run(loaded, directory, display.say)
        show_json(planned) if json else show_facts({name: _plain_words(x) for name, x in planned.items()})
        return
    if seeds is not None:
        _search_seeds(loaded, directory, parse_seeds(seeds), again, json, anyway=anyway)
        return
    outcome = _search_one(loaded, directory, again, anyway=anyway)
    directory = rooms.last_stage(directory)
    view = rooms.open_run(directory)
    ended = {"ended": outcome.reason, "spent": asdict(outcome.spent)}
    if not view.front():
        if json:
            show_json({"run": str(directory), **ended, "front": []})
        raise typer.Exit(STOPPED if outcome.reason == "stopped" else DONE)
    show_front(view, json, ended)
    if not json and outcome.reason != "stopped":
        where = shlex.quote(str(directory))
        bound = _next_bound(view)
        show(f"\nNext:  secateur report {where}\n       secateur pick {where} {bound}")
        show(f"       secateur export {where} {bound} --to {shlex.quote(str(directory / 'model'))}")
    if outcome.reason == "stopped":
        raise typer.Exit(STOPPED)


def _plain_words(value: object) -> str:
    """A plain value in a line."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {_plain_words(x)}" for name, x in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain_words, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def parse_seeds(text: str) -> list[int]:
    """Seeds from a text such as ``0,1,2``.

    Raises:
        UsageError: if it is none, or names one twice.
    """
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if part.isascii() and part.isdecimal()]
    if len(seeds) < len(parts) or len(set(seeds)) < len(seeds):
        raise UsageError(f"Expected `--seeds` such as 0,1,2, each once, got {text!r}.")
    return seeds


def _search_seeds(
    loaded: Settings, directory: Path, seeds: list[int], again: str, json: bool, *, anyway: bool
) -> None:
    """Search once a seed, one after another, and compare what was found."""
    from secateur.search import app as rooms
    from secateur.search.cli.comparing import show_compared

    directories = []
    for seed in seeds:
        place = directory.with_name(f"{directory.name}-seed{seed}")
        if not json:
            show(f"seed {seed}: {place}")
        outcome = _search_one(loaded.model_copy(update={"seed": seed}), place, again, anyway=anyway)
        if outcome.reason == "stopped":
            raise typer.Exit(STOPPED)
        directories.append(rooms.last_stage(place))
    show_compared([rooms.open_run(place) for place in directories], json=json)
    if not json:
        show(f"\nNext:  secateur compare {shlex.join(map(str, directories))} --form latex")


def _search_one(loaded: Settings, directory: Path, again: str, *, anyway: bool) -> Outcome:
    """Search with progress on stderr; `again` is the command that continues it."""
    from secateur.search import app as rooms
    from secateur.search.loop.interrupt import Interrupt

    with open_display(loaded) as display, Interrupt(display.note, again) as interrupt:

        def on_ready(loop: Search, executor: Executor) -> None:
            interrupt.watch(loop)
            display.watch(loop.baselines, executor, lambda: loop.notes)

        try:
            outcome = rooms.search(
                loaded,
                directory,
                forecast=lambda note: rooms.forecast_before(loaded, directory, note, anyway=anyway),
                observers=[display, interrupt],
                say=display.say,
                note=display.note,
                on_ready=on_ready,
            )
        except KeyboardInterrupt:
            display.note(f"Continue with: {again}")
            raise
    if outcome.reason == "stopped":
        complain(f"Stopped. Continue with: {again}", "note")
    return outcome


def status(
    run: RunDir,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Update until the search ends; with --json, one line per update."),
    ] = False,
    every: Annotated[float, typer.Option(help="Seconds between updates of --watch.")] = 2.0,
    json: Json = False,
) -> None:
    """Show the progress of a search."""
    from secateur.search.results.run import open_run
    from secateur.search.show.summary import status_lines, summary

    if watch:
        _watch(run, every, json)
        return
    state = read_state(run)
    if state is not None and not (run / ABOUT).is_file():  # no study yet
        early = {"run": str(run), "state": state.to_json()}
        show_json(early) if json else show_facts({"run": str(run), "state": _early_words(run, state)})
        return
    facts = summary(open_run(run))
    if json:
        show_json(facts)
    else:
        show_facts(status_lines(facts))


def _early_words(run: Path, state: RunState) -> str:
    from secateur.search.show.watch import preparing

    return preparing(run) if state.state == "preparing" else state_words(state)


def _watch(run: Path, every: float, json: bool) -> None:
    """Show the progress again and again, until no process writes the run any more or Ctrl-C."""
    from rich.console import Console

    from secateur.search.show.watch import watch, watch_here

    if not every > 0:
        raise UsageError(f"Expected `--every` > 0 seconds, got {every}.")
    try:
        if json:
            watch(run, lambda facts: show_line(dumps(facts)), every)
        else:
            watch_here(run, Console(highlight=False), every)
            complain(f"Nobody is writing {run} any more.", "note")
    except KeyboardInterrupt:
        complain("No longer watching; the search goes on.", "note")


def dashboard(
    run: RunDir,
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
) -> None:
    """Serve a run to a browser with optuna-dashboard. Ctrl-C ends it."""
    from secateur.search.mirror.dashboard import serve_dashboard
    from secateur.search.results.run import open_run

    with contextlib.suppress(KeyboardInterrupt):
        serve_dashboard(open_run(run), host, port, lambda address: show_line(f"{address}  (Ctrl-C ends it)"))
