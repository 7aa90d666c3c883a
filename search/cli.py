"""The command ``secateur``: a thin skin over `app`. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.search.choice import Bounds, choose, with_bounds
from secateur.search.errors import UsageError, nearest
from secateur.search.mirror.address import masked
from secateur.search.show.answers import one_line, open_display, show_facts, show_front, watch_status
from secateur.search.show.console import FAILED, complain, run_command, show, show_json, show_line

if TYPE_CHECKING:
    from secateur.search.executor import Executor
    from secateur.search.loop import Search

# Nothing that a command may not need is imported above: `secateur --help` is quick, and reading a run needs no torch.

app = typer.Typer(
    help="Searches for the best way to prune a language model.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
TrialNumber = Annotated[
    int | None, typer.Argument(metavar="TRIAL", help="Number of a trial, instead of bounds.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
LISTED = ("spaces", "controllers", "evaluators", "metrics", "families", "formats", "executors")


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
    from secateur.search.interrupt import Interrupt

    loaded = rooms.load_settings(settings, override or ())
    directory = run or Path("runs") / (settings.stem if settings else Path(loaded.model).stem)
    words = [str(settings)] * (settings is not None) + [x for o in override or () for x in ("-o", o)]
    again = masked(shlex.join(["secateur", "search", *words, "--run", str(directory)]))
    with open_display(loaded) as display, Interrupt(display.note, again) as interrupt:

        def on_ready(loop: Search, executor: Executor) -> None:
            interrupt.watch(loop)
            display.watch(loop.baselines, executor)

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


@app.command()
def front(run: RunDir, json: Json = False) -> None:
    """The trials that no other one beats in everything: a table, and a picture in RUN/report."""
    from secateur.search.run import open_run

    show_front(open_run(run), json)


@app.command()
@with_bounds
def pick(run: RunDir, *, json: Json = False, bounds: Bounds) -> None:
    """The trial with the lowest loss within the bounds."""
    from secateur.search.run import open_run
    from secateur.search.show.tables import Row, perplexity, row_json, shown

    view = open_run(run)
    trial = choose(view, None, bounds)
    test = view.test_of(trial)
    if json:
        document = row_json(Row(trial, test, "", on_front=False))
        show_json({"run": str(run), **document, "sparsity_of": view.allocation(trial)})
        return
    values = {**trial.measurement.values, "ppl": perplexity(trial.measurement.values)}
    show(f"trial {trial.number}: {trial.measurement.candidate}")
    facts = {name: shown(name, value) for name, value in values.items()}
    if test is not None and test.infeasible is None:
        facts |= {
            "test loss": shown("loss", test.values["loss"]),
            "test ppl": shown("ppl", perplexity(test.values)),
        }
    show_facts(facts)
    show(f"\nNext:  secateur export {shlex.quote(str(run))} {trial.number} --to DIR")


@app.command()
@with_bounds
def export(
    run: RunDir,
    to: Annotated[Path, typer.Option(metavar="DIR", help="New or empty directory for the model.")],
    trial: TrialNumber = None,
    calibration: Annotated[
        str | None, typer.Option(help="sequential or dense; default: as the settings say.")
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
        summary = rooms.export(run, chosen, to, calibration=calibration, say=display.say)
    if json:
        show_json({**vars(summary), "directory": str(summary.directory), "trial": chosen.number})
        return
    show(
        f"trial {chosen.number} {'was there already' if summary.already else 'exported'}: {summary.directory}"
    )
    show_facts({where: one_line(values) for where, values in summary.measured.items()})
    show_facts({name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in summary.checks.items()})
    show(summary.label)


@app.command()
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


@app.command()
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
    from secateur.search.run import open_run
    from secateur.search.show.summary import status_lines, summary

    view = open_run(run)
    facts = summary(view)
    if json:
        show_json(facts)
    else:
        show_facts(status_lines(facts))


@app.command()
def dashboard(
    run: RunDir,
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
) -> None:
    """Look at a run in a browser, with optuna-dashboard. Ctrl-C ends it."""
    from secateur.search.mirror.dashboard import serve_dashboard
    from secateur.search.run import open_run

    with contextlib.suppress(KeyboardInterrupt):
        serve_dashboard(open_run(run), host, port, lambda address: show_line(f"{address}  (Ctrl-C ends it)"))


@app.command()
@with_bounds
def report(run: RunDir, trial: TrialNumber = None, *, json: Json = False, bounds: Bounds) -> None:
    """One self-contained page about the run: RUN/report/index.html. Trial or bounds choose the model in detail."""
    from secateur.search.run import open_run
    from secateur.search.show.report import write_report

    view = open_run(run)
    asked = trial is not None or any(bounds.values())
    files = write_report(view, choose(view, trial, bounds) if asked else None)
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
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's code.")
    ] = False,
    json: Json = False,
) -> None:
    """Perplexity of a model, and how many of its weights are zero."""
    from secateur.search import app as rooms

    with open_display() as display:
        facts = rooms.evaluate(
            model,
            text=text,
            n_tokens=tokens,
            window=window,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            say=display.say,
        )
    if json:
        show_json(facts)
    else:
        show_facts({name: f"{v:.4f}" if isinstance(v, float) else str(v) for name, v in facts.items()})


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help=f"One of: {', '.join(LISTED)}.")],
    json: Json = False,
) -> None:
    """What there is to choose from."""
    from secateur.search.show.listing import LISTS

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
        show_facts({check.name: f"{marks[check.ok]:4} {check.found}" for check in checks})
    if any(check.ok is False for check in checks):
        raise typer.Exit(FAILED)


# --- helpers ---


def _metrics() -> list[dict[str, str]]:
    from secateur.pruners.methods import RECONSTRUCTIONS
    from secateur.pruners.metrics import METRICS
    from secateur.search.show.listing import row
    from secateur.spaces.formulas.operators import OPERATORS, TERMINALS

    scores = [row(name, metric.summary, metric.paper) for name, metric in METRICS.items()]
    updates = [row(name, *about) for name, about in RECONSTRUCTIONS.items()]
    signs = [operator.infix or name for name, operator in OPERATORS.items()]
    formulas = row(
        "formula: ...", f"such as abs(W) * X; of {' '.join(TERMINALS)}, numbers, {' '.join(signs)}"
    )
    return [*scores, *updates, formulas]


def _families() -> list[dict[str, str]]:
    from secateur.pruners.families.discover import FAMILIES
    from secateur.search.show.listing import row

    return [row(name, "tested; others that are built alike work too") for name in FAMILIES]


def _torch_facts() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.get_num_threads()} threads, CUDA: {', '.join(gpus) or 'none'}"


if __name__ == "__main__":
    main()
