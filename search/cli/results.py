"""Commands about what a run has found."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from secateur.search.cli.choice import Bounds, choose, with_bounds
from secateur.search.cli.exported import show_export
from secateur.search.cli.options import Json, RunDir, TrialNumber
from secateur.search.errors import UsageError
from secateur.search.show.answers import open_display, show_facts, show_front
from secateur.search.show.console import FAILED, show, show_json


def front(run: RunDir, json: Json = False) -> None:
    """The trials that no other one beats in everything: a table, and a picture in RUN/report."""
    from secateur.search.results.run import open_run

    show_front(open_run(run), json)


@with_bounds
def pick(run: RunDir, *, json: Json = False, bounds: Bounds) -> None:
    """The trial with the lowest loss within the bounds."""
    from secateur.search.results.run import open_run
    from secateur.search.show.tables import row_json, row_of
    from secateur.search.show.values import perplexity, shown

    view = open_run(run)
    trial = choose(view, None, bounds)
    test = view.test_of(trial)
    if json:
        show_json({"run": str(run), **row_json(row_of(view, trial)), "sparsity_of": view.allocation(trial)})
        return
    values = {**view.values_of(trial), "ppl": perplexity(trial.measurement.values)}
    show(f"trial {trial.number}: {trial.measurement.candidate}")
    facts = {name: shown(name, value, absent="–") for name, value in values.items()}
    if test is not None and test.infeasible is None:
        facts |= {
            "test loss": shown("loss", test.values["loss"]),
            "test ppl": shown("ppl", perplexity(test.values)),
        }
    show_facts(facts)
    show(f"\nNext:  secateur export {shlex.quote(str(run))} {trial.number} --to DIR")


def order(run: RunDir, json: Json = False) -> None:
    """The order in which a search removed whole sub-layers or blocks: a file for the allocation rule prefix."""
    from secateur.search.results.removal_order import order_of
    from secateur.search.results.run import open_run

    lines = order_of(open_run(run))
    if json:
        show_json(lines)
        return
    for line in lines:
        show("- {" + ", ".join(f"{name}: {value}" for name, value in line.items()) + "}")


@with_bounds
def report(run: RunDir, trial: TrialNumber = None, *, json: Json = False, bounds: Bounds) -> None:
    """One self-contained page about the run: RUN/report/index.html. Trial or bounds choose the model in detail."""
    from secateur.search.results.run import open_run
    from secateur.search.show.report import write_report

    view = open_run(run)
    asked = trial is not None or any(bounds.values())
    files = write_report(view, choose(view, trial, bounds) if asked else None)
    if json:
        show_json({"run": str(run), "files": [str(file) for file in files]})
    else:
        show("\n".join(map(str, files)))


@with_bounds
def export(
    run: RunDir,
    to: Annotated[Path, typer.Option(metavar="DIR", help="New or empty directory for the model.")],
    trial: TrialNumber = None,
    calibration: Annotated[
        str | None, typer.Option(help="sequential or dense; default: as the settings say.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="See `secateur list formats`; default: as the settings say."),
    ] = None,
    *,
    json: Json = False,
    bounds: Bounds,
) -> None:
    """Prune once more, for real, and write a directory that stock transformers loads."""
    from secateur.search import app as rooms

    if calibration not in (None, "dense", "sequential"):
        raise UsageError(f"Expected `--calibration` dense or sequential, got {calibration!r}.")
    view = rooms.open_run(run)
    chosen = choose(view, trial, bounds)
    with open_display() as display:
        summary = rooms.export(run, chosen, to, calibration=calibration, form=form, say=display.say)
    if json:
        show_json({**vars(summary), "directory": str(summary.directory), "trial": chosen.number})
        return
    show_export(summary, f"trial {chosen.number}")


@with_bounds
def recover(
    run: RunDir,
    trials: Annotated[
        list[int] | None, typer.Argument(metavar="[TRIAL ...]", help="Numbers of trials, instead of bounds.")
    ] = None,
    method: Annotated[str, typer.Option(help="What learns: lora, full or norms.")] = "lora",
    loss: Annotated[str, typer.Option(help="kl (distil from the dense model) or ce.")] = "kl",
    tokens: Annotated[int, typer.Option(help="To train on, repetitions counted.")] = 65536,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: the method's own.")] = None,
    rank: Annotated[int, typer.Option(help="Of the updates of lora.")] = 16,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default: a local one.")] = None,
    *,
    json: Json = False,
    bounds: Bounds,
) -> None:
    """Train picked models for longer, zeros kept, and save them in RUN/recovered. The same command continues."""
    from secateur.search import app as rooms
    from secateur.search.recovery.stage import recovery_settings
    from secateur.search.show.answers import show_recovered

    settings = recovery_settings(method=method, loss=loss, tokens=tokens, lr=lr, rank=rank, address=address)
    view = rooms.open_run(run)
    chosen = [choose(view, number, bounds) for number in (trials or (None,))]
    with open_display() as display:
        results = rooms.recover(run, chosen, settings, say=display.say)
    show_recovered(rooms.open_run(run), results, json)
    if all(result.measurement is None for result in results):
        raise typer.Exit(FAILED)
