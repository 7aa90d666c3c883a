"""The command ``secateur``: a thin skin over `app`. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.search.console import FAILED, complain, run_command, show, show_json
from secateur.search.errors import UsageError, nearest

if TYPE_CHECKING:
    from secateur.search.controller import Trial
    from secateur.search.display import Display
    from secateur.search.run import Run
    from secateur.search.settings import Settings

# Nothing that a command may not need is imported above: `secateur --help` is quick, and reading a run needs no torch.

app = typer.Typer(
    help="Searches for the best way to prune a language model.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
TrialNumber = Annotated[int | None, typer.Argument(metavar="[TRIAL]", help="Number of a trial, instead of bounds.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
MaxParams = Annotated[str | None, typer.Option("--max-params", help="E.g. 90e6, 90M, or 0.7x of the dense model.")]
MaxSize = Annotated[str | None, typer.Option("--max-size", help="E.g. 180MB, or 0.7x.")]
MaxMacs = Annotated[str | None, typer.Option("--max-macs", help="Multiply-accumulates a token, e.g. 60M, or 0.7x.")]
MaxKv = Annotated[str | None, typer.Option("--max-kv", help="KV cache a token, e.g. 12KiB, or 0.7x.")]
MaxLatency = Annotated[str | None, typer.Option("--max-latency", help="E.g. 30ms, or 0.7x.")]
LISTED = ("spaces", "controllers", "evaluators", "metrics", "families", "formats", "executors")
Sparsity = Annotated[str | None, typer.Option("--sparsity", help="Share of zeros, at least; e.g. 0.6.")]


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(lambda: _dispatch(sys.argv[1:])))


def _dispatch(arguments: list[str]) -> None:
    """Parse and run, without typer's own handling of errors and interrupts: `run_command` has one for all."""
    command = typer.main.get_command(app)
    with command.make_context("secateur", arguments or ["--help"]) as context:
        command.invoke(context)


@app.command()
def search(
    settings: Annotated[Path | None, typer.Argument(metavar="[SETTINGS.yaml]", help="Without: defaults.")] = None,
    override: Annotated[list[str] | None, typer.Option("-o", metavar="KEY.PATH=VALUE", help="Override.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="Of the run; default: runs/NAME.")] = None,
    json: Json = False,
) -> None:
    """Start a search, or continue where it stopped. Ctrl-C is safe."""
    from secateur.search import app as rooms
    from secateur.search.interrupt import Interrupt

    loaded = rooms.load_settings(settings, override or ())
    directory = run or Path("runs") / (settings.stem if settings else Path(loaded.model).stem)
    words = [str(settings)] * (settings is not None) + [x for o in override or () for x in ("-o", o)]
    again = shlex.join(["secateur", "search", *words, "--run", str(directory)])
    with _display(loaded) as display, Interrupt(display.note, again) as interrupt:
        try:
            outcome = rooms.search(
                loaded, directory, observers=[display, interrupt], say=display.say, on_ready=interrupt.watch
            )
        except KeyboardInterrupt:
            display.note(f"Continue with: {again}")
            raise
    view = rooms.open_run(directory)
    ended = {"ended": outcome.reason, "spent": asdict(outcome.spent)}
    _show_front(view, json, ended)
    if not json:
        where = shlex.quote(str(directory))
        budget = f"{max(trial.measurement.values.get('sparsity', 0.0) for trial in view.front()):.2g}"
        show(f"\nNext:  secateur report {where}\n       secateur pick {where} --sparsity {budget}")
        show(f"       secateur export {where} --sparsity {budget} --to {where}/model")
        if outcome.reason == "stopped":
            show(f"or go on:  {again}")


@app.command()
def front(run: RunDir, json: Json = False) -> None:
    """The trials that no other one beats in everything: a table, and a picture in RUN/report."""
    from secateur.search.run import open_run

    _show_front(open_run(run), json)


@app.command()
def pick(
    run: RunDir,
    max_params: MaxParams = None,
    max_size: MaxSize = None,
    max_macs: MaxMacs = None,
    max_kv: MaxKv = None,
    max_latency: MaxLatency = None,
    sparsity: Sparsity = None,
    json: Json = False,
) -> None:
    """The trial with the lowest loss within the bounds."""
    from secateur.search.run import open_run
    from secateur.search.tables import Row, perplexity, row_json, shown

    view = open_run(run)
    trial = _choose(view, None, _bounds(max_params, max_size, max_macs, max_kv, max_latency, sparsity))
    test = view.test_of(trial)
    if json:
        document = row_json(Row(trial, test, "", on_front=False))
        show_json({"run": str(run), **document, "sparsity_of": view.allocation(trial)})
        return
    values = {**trial.measurement.values, "ppl": perplexity(trial.measurement.values)}
    show(f"trial {trial.number}: {trial.measurement.candidate}")
    _print_facts({name: shown(name, value) for name, value in values.items()})
    if test is not None and test.infeasible is None:
        _print_facts({f"test {n}": shown(n, v) for n, v in {**test.values, "ppl": perplexity(test.values)}.items()
                      if n in ("loss", "ppl")})
    show(f"\nNext:  secateur export {shlex.quote(str(run))} {trial.number} --to DIR")


@app.command()
def export(
    run: RunDir,
    to: Annotated[Path, typer.Option(metavar="DIR", help="New or empty directory for the model.")],
    trial: TrialNumber = None,
    calibration: Annotated[
        str | None, typer.Option(help="sequential or dense; default: as the settings say.")
    ] = None,
    max_params: MaxParams = None,
    max_size: MaxSize = None,
    max_macs: MaxMacs = None,
    max_kv: MaxKv = None,
    max_latency: MaxLatency = None,
    sparsity: Sparsity = None,
    json: Json = False,
) -> None:
    """Prune once more, for real, and write a directory that stock transformers loads."""
    from secateur.search import app as rooms

    if calibration not in (None, "dense", "sequential"):
        raise UsageError(f"Expected `--calibration` dense or sequential, got {calibration!r}.")
    view = rooms.open_run(run)
    chosen = _choose(view, trial, _bounds(max_params, max_size, max_macs, max_kv, max_latency, sparsity))
    with _display() as display:
        summary = rooms.export(run, chosen, to, calibration=calibration, say=display.say)
    if json:
        show_json({**vars(summary), "directory": str(summary.directory), "trial": chosen.number})
        return
    show(f"trial {chosen.number} {'was there already' if summary.already else 'exported'}: {summary.directory}")
    _print_facts({where: _values(values) for where, values in summary.measured.items()})
    _print_facts({name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in summary.checks.items()})
    show(summary.label)


@app.command()
def status(run: RunDir, json: Json = False) -> None:
    """How far a search is."""
    from secateur.search.run import open_run
    from secateur.search.summary import status_lines, summary

    view = open_run(run)
    facts = summary(view)
    if json:
        show_json(facts)
    else:
        _print_facts(status_lines(facts))


@app.command()
def report(
    run: RunDir,
    trial: TrialNumber = None,
    max_params: MaxParams = None,
    max_size: MaxSize = None,
    max_macs: MaxMacs = None,
    max_kv: MaxKv = None,
    max_latency: MaxLatency = None,
    sparsity: Sparsity = None,
    json: Json = False,
) -> None:
    """One self-contained page about the run: RUN/report/index.html. Trial or bounds choose the model in detail."""
    from secateur.search.report import write_report
    from secateur.search.run import open_run

    view = open_run(run)
    bounds = _bounds(max_params, max_size, max_macs, max_kv, max_latency, sparsity)
    asked = trial is not None or any(bounds.values())
    files = write_report(view, _choose(view, trial, bounds) if asked else None)
    if json:
        show_json({"run": str(run), "files": [str(file) for file in files]})
    else:
        show("\n".join(map(str, files)))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="tiny, a hub id, a directory or a .gguf file.")],
    text: Annotated[str, typer.Option(help="docs, a file, a directory or a hub data set.")] = "docs",
    tokens: Annotated[int, typer.Option(help="A multiple of the window.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens that the model sees at once.")] = 512,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's code.")] = False,
    json: Json = False,
) -> None:
    """Perplexity of a model, and how many of its weights are zero."""
    from secateur.search import app as rooms

    with _display() as display:
        facts = rooms.evaluate(
            model, text=text, n_tokens=tokens, window=window, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, say=display.say,
        )
    if json:
        show_json(facts)
    else:
        _print_facts({name: f"{v:.4f}" if isinstance(v, float) else str(v) for name, v in facts.items()})


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help=f"One of: {', '.join(LISTED)}.")],
    json: Json = False,
) -> None:
    """What there is to choose from."""
    from secateur.search.listing import LISTS

    if what not in LISTED:
        raise UsageError(f"Expected something to list, got {what!r}.{nearest(what, LISTED)}")
    rows = {**LISTS, "metrics": _metrics, "families": _families}[what]()
    if json:
        show_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        parts = (row["name"].ljust(width), row["summary"], row["source"])
        show("  ".join(part for part in parts if part).rstrip())


@app.command()
def doctor(json: Json = False) -> None:
    """Whether this machine has what a search needs."""
    from secateur.pruners.checkpoints.cache import cache_root
    from secateur.pruners.loading import find_checkpoint
    from secateur.search.doctor import examine

    checks = examine(cache_root(), _torch_facts, lambda: find_checkpoint("tiny").location)
    if json:
        show_json([asdict(check) for check in checks])
    else:
        marks = {True: "ok", None: "-", False: "BAD"}
        _print_facts({check.name: f"{marks[check.ok]:4} {check.found}" for check in checks})
    if any(check.ok is False for check in checks):
        raise typer.Exit(FAILED)


# --- helpers ---


def _show_front(run: Run, json: bool, ended: Mapping[str, Any] | None = None) -> None:
    """Print the front, and draw it into the run's directory if that can be written."""
    from secateur.search.plots import plot_front
    from secateur.search.tables import as_table, front_json, front_rows

    rows = front_rows(run)
    if not rows:
        raise UsageError(f"Expected a run with trials to compare, got {run.study.directory} without. Let it search on.")
    picture = run.study.directory / "report" / "front.png"
    try:
        plot_front(picture, run.trials(), run.front(), run.baselines, run.objectives)
    except OSError as error:  # e.g. somebody else's run
        complain(f"{picture} was not written: {error.strerror}.", "warning")
    if json:
        show_json({**(ended or {}), **front_json(run, rows), "picture": str(picture)})
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    Console(width=width, highlight=False).print(as_table(run, rows))
    show(f"picture: {picture}")


def _bounds(*texts: str | None) -> dict[str, str | None]:
    """The options for bounds by name, in the order of `BOUND_KINDS`."""
    from secateur.search.pick import BOUND_KINDS

    return dict(zip(BOUND_KINDS, texts, strict=True))


def _choose(run: Run, number: int | None, bounds: Mapping[str, str | None]) -> Trial:
    """The trial with this number, or the best one within the bounds."""
    from secateur.search.pick import parse_bounds

    if number is None:
        return run.pick(parse_bounds(bounds))
    if any(text is not None for text in bounds.values()):
        raise UsageError("Expected a trial's number or bounds, got both. Leave one out.")
    return run.pick(number=number)


def _display(settings: Settings | None = None) -> Display:
    from rich.console import Console

    from secateur.search.display import Display

    return Display(Console(stderr=True, highlight=False), settings)


def _print_facts(facts: Mapping[str, str]) -> None:
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        show(f"  {name.ljust(width)}  {value}")


def _values(values: Mapping[str, float]) -> str:
    from secateur.search.tables import perplexity, shown

    found = {**values, "ppl": perplexity(values)}
    return ", ".join(f"{name} {shown(name, value)}" for name, value in found.items() if value is not None)


def _metrics() -> list[dict[str, str]]:
    from secateur.pruners.methods import RECONSTRUCTIONS
    from secateur.pruners.metrics import METRICS
    from secateur.search.listing import row

    scores = [row(name, metric.summary, metric.paper) for name, metric in METRICS.items()]
    return scores + [row(name, *about) for name, about in RECONSTRUCTIONS.items()]


def _families() -> list[dict[str, str]]:
    from secateur.pruners.families.discover import FAMILIES
    from secateur.search.listing import row

    return [row(name, "tested; others that are built alike work too") for name in FAMILIES]


def _torch_facts() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.get_num_threads()} threads, CUDA: {', '.join(gpus) or 'none'}"


if __name__ == "__main__":
    main()
