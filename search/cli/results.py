"""Commands for the results of a run: ``front``, ``pick``, ``order``, ``report``, ``export``, ``recover``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.search.cli.option_groups import (
    Anyway,
    Bounds,
    ExportFormat,
    Json,
    NewDir,
    RunDir,
    TrialNumber,
    choose,
    with_bounds,
)
from secateur.search.errors import FAILED, UsageError
from secateur.search.results.shares import shares_words
from secateur.search.show.console import open_display, show, show_facts, show_json
from secateur.search.show.forecast import truth_line
from secateur.search.show.values import one_line, perplexity, shown
from secateur.search.study.foreseen import read_foreseen

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary
    from secateur.search.recovery.stage import Recovered
    from secateur.search.results.run import Run


METHOD = "Parameters that are trained: lora, full, norms, spp, scale_lora, perp, slope, last or merged."


def front(run: RunDir, json: Json = False) -> None:
    """Show the Pareto front: a table, and a picture in RUN/report."""
    from secateur.search.results.run import open_run
    from secateur.search.show.front_table import show_front

    show_front(open_run(run), json)


@with_bounds
def pick(run: RunDir, *, json: Json = False, bounds: Bounds) -> None:
    """Show the trial with the lowest loss within the bounds."""
    from secateur.search.results.paired import against_baseline
    from secateur.search.results.run import open_run
    from secateur.search.show.front_table import row_json, row_of

    view = open_run(run)
    trial = choose(view, None, bounds)
    test = view.test_of(trial)
    if json:
        show_json({"run": str(run), **row_json(row_of(view, trial)), "sparsity_of": view.allocation(trial)})
        return
    values = {**view.values_of(trial), "ppl": perplexity(trial.measurement.values)}
    against = against_baseline(view, trial)
    show(f"trial {trial.number}: {trial.measurement.candidate}")
    facts = {} if against is None else {f"test loss / {against.of}": against.text}
    facts |= {name: shown(name, value, absent="–") for name, value in values.items()}
    if view.structured:  # what is removed is no zero
        del facts["sparsity"]
    if (removed := view.removed(trial)) is not None:
        facts["removed"] = shares_words(removed)
    if test is not None and test.infeasible is None:
        facts |= {
            "test loss": shown("loss", test.values["loss"]),
            "test ppl": shown("ppl", perplexity(test.values)),
        }
    show_facts(facts)
    show(f"\nNext:  secateur export {shlex.quote(str(run))} {trial.number} --to DIR")


def order(run: RunDir, json: Json = False) -> None:
    """Print the order in which a search removed sub-layers or blocks, as a file for the allocation rule `prefix`."""
    from secateur.search.results.removal_order import order_of
    from secateur.search.results.run import open_run

    lines = order_of(open_run(run))
    if json:
        show_json(lines)
        return
    for line in lines:
        show("- {" + ", ".join(f"{name}: {value}" for name, value in line.items()) + "}")


@with_bounds
def report(
    run: RunDir,
    trial: TrialNumber = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="A further run in the same page; may be repeated."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; default: RUN/report/index.html.")
    ] = None,
    *,
    json: Json = False,
    bounds: Bounds,
) -> None:
    """Write a self-contained page, RUN/report/index.html; a trial's number or bounds choose the model in detail."""
    from secateur.search.results.run import open_run
    from secateur.search.show.report import write_report

    view = open_run(run)
    asked = trial is not None or any(bounds.values())
    chosen, others = choose(view, trial, bounds) if asked else None, [open_run(path) for path in beside or ()]
    files = write_report(view, chosen, beside=others, to=to)
    if json:
        show_json({"run": str(run), "files": [str(file) for file in files]})
    else:
        show("\n".join(map(str, files)))


@with_bounds
def export(
    run: RunDir,
    to: NewDir,
    trial: TrialNumber = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="sequential, dense or expected statistics; default: as in the run's settings."),
    ] = None,
    form: ExportFormat = None,
    stream: Annotated[
        str | None,
        typer.Option(
            metavar="auto|always|never",
            help="Block by block from the files, never the whole model; default: as in the run's settings.",
        ),
    ] = None,
    *,
    json: Json = False,
    bounds: Bounds,
) -> None:
    """Prune the model by a trial, and write a directory that stock transformers loads."""
    from secateur.search import app as rooms

    if calibration not in (None, "dense", "sequential", "expected"):
        raise UsageError(f"Expected `--calibration` dense, sequential or expected, got {calibration!r}.")
    view = rooms.open_run(run)
    chosen = choose(view, trial, bounds)
    with open_display() as display:
        how: dict[str, Any] = {"calibration": calibration, "form": form, "stream": stream}
        summary = rooms.export(run, chosen, to, **how, say=display.say)
    if json:
        show_json({**vars(summary), "directory": str(summary.directory), "trial": chosen.number})
    else:
        show_export(summary, f"trial {chosen.number}")


def show_export(summary: ExportSummary, what: str) -> None:
    """Print the directory, the measurements and the checks of an exported model, named e.g. ``trial 7``."""
    show(f"{what} {'was exported before' if summary.already else 'exported'}: {summary.directory}")
    show_facts({where: one_line(values) for where, values in summary.measured.items()})
    show_facts({name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in summary.checks.items()})
    if summary.shares:
        show_facts({"removed": shares_words(summary.shares)})
    if summary.text:
        show(f"measured on {summary.text}")
    show(summary.label)
    for path in summary.removed:
        show(f"removed {path}, left by a killed export")


def show_foreseen(directory: Path | None) -> None:
    """Print the forecast of the command that made a model, beside the truth, if there is one."""
    foreseen = None if directory is None else read_foreseen(directory)
    if foreseen is not None:
        show_facts({"forecast": truth_line(*foreseen)})


@with_bounds
def recover(  # noqa: PLR0913  # options of a command
    run: RunDir,
    trials: Annotated[
        list[int] | None,
        typer.Argument(metavar="TRIAL", help="Numbers of trials, in place of bounds."),
    ] = None,
    method: Annotated[str, typer.Option(help=METHOD)] = "lora",
    loss: Annotated[
        str, typer.Option(help="kl (distillation from the dense model), ce, or reconstruct (block by block).")
    ] = "kl",
    tokens: Annotated[int, typer.Option(help="Training tokens, repetitions included.")] = 65536,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: depends on the method.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of low-rank updates.")] = 16,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; default: a local one.")
    ] = None,
    anyway: Anyway = False,
    *,
    data: Annotated[
        str,
        typer.Option(
            help="Training windows: all, or those that paser chooses, where pruning did most damage."
        ),
    ] = "all",
    share: Annotated[float, typer.Option(help="Share of the windows that paser chooses at most.")] = 0.2,
    json: Json = False,
    bounds: Bounds,
) -> None:
    """Train picked models with their zeros kept, and save them in RUN/recovered. The same command continues."""
    from secateur.search import app as rooms
    from secateur.search.app.beside_truth import beside_truth
    from secateur.search.app.forecast_recover import forecast_recover
    from secateur.search.app.forecasting import foretold, stream_by
    from secateur.search.recovery.stage import recovery_settings

    settings = recovery_settings(
        method=method, loss=loss, tokens=tokens, lr=lr, rank=rank, data=data, share=share, address=address
    )
    view = rooms.open_run(run)
    chosen = [choose(view, number, bounds) for number in (trials or (None,))]
    with open_display() as display:
        foreseen = foretold(
            lambda timing: forecast_recover(run, chosen, settings.training, timing=timing),
            display.note,
            anyway=anyway,
        )
        stream = stream_by(foreseen, view.settings.stream)
        with beside_truth(foreseen) as filled:
            results = rooms.recover(run, chosen, settings, stream=stream, say=display.say)
            new = [result for result in results if result.measurement and not result.note]
            filled.directories += [result.directory for result in new if result.directory]
            filled.seconds = sum(result.measurement.seconds for result in new if result.measurement)
    _show_recovered(rooms.open_run(run), results, json)
    if all(result.measurement is None for result in results):
        raise typer.Exit(FAILED)


def _show_recovered(run: Run, results: Sequence[Recovered], json: bool) -> None:
    """Print recovered trials beside their test losses before."""
    rows = []
    for found in results:
        test, measured = run.test_of(run.study.trials[found.trial]), found.measurement
        row = {
            "trial": found.trial,
            "model": None if found.directory is None else str(found.directory / "model"),
            "test": None if test is None else dict(test.values),
            "recovered": None if measured is None else dict(measured.values),
            "note": found.note,
        }
        rows.append(row)
        if not json and measured is not None:
            show(f"trial {found.trial} {found.note or 'recovered'}: {row['model']}")
            facts = {} if test is None else {"test, as searched": _losses(test.values)}
            show_facts(facts | {"test, as recovered": _losses(measured.values)})
            show_foreseen(found.directory)
        elif not json:
            show(f"trial {found.trial}: {found.note}")
    if json:
        show_json({"run": str(run.study.directory), "recovered": rows})


def _losses(values: Mapping[str, float]) -> str:
    return one_line({name: values[name] for name in ("loss", "ce") if name in values})
