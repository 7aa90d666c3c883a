"""Table of the front: rows, printed for people or as JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from secateur.search.errors import UsageError
from secateur.search.losses import loss_of
from secateur.search.objectives import objective
from secateur.search.results.paired import Estimate, against_baseline
from secateur.search.results.targets import references, target_of, target_sparsities
from secateur.search.show.console import complain, show, show_json
from secateur.search.show.values import perplexity, shown
from secateur.spaces.measurement import Measurement

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.search.controller import Trial
    from secateur.search.results.run import Run

QUALITY_STUDY = "quality study: no smaller, no faster on stock servers (the zeros are stored)"
STRUCTURED = "structured: really smaller; what is removed is neither stored nor computed"
HEADING_WIDTH = 10  # of a line of a heading, so that columns are as narrow as their numbers
PIPE_WIDTH = 160  # columns of a table in a file or a pipe


@dataclass(frozen=True)
class FrontRow:
    """Row of the front's table.

    Args:
        trial: at the search's largest fidelity.
        values: of the trial; None where the candidate has no such cost.
        test: measurement of the candidate on the test part, if any.
        recovered: measurement of the candidate after recovery, on the test part, if any.
        note: name of a baseline, or the ratio to the loss of the target's baseline.
        on_front: False for a baseline that is listed below the front.
        test_ratio: of the test loss to that of the target's baseline, if there is one.
        removed: shares of a structured candidate, see `Run.removed`.
    """

    trial: Trial
    values: Mapping[str, float | None]
    test: Measurement | None
    recovered: Measurement | None
    note: str = ""
    on_front: bool = False
    test_ratio: Estimate | None = None
    removed: Mapping[str, float] | None = None


def row_of(run: Run, trial: Trial, note: str = "", *, on_front: bool = False) -> FrontRow:
    """Row of one trial."""
    test, recovered = run.test_of(trial), run.recovered_of(trial)
    return FrontRow(
        trial,
        run.values_of(trial),
        test,
        recovered,
        note,
        on_front,
        against_baseline(run, trial),
        run.removed(trial),
    )


def front_rows(run: Run) -> list[FrontRow]:
    """Rows of the front, the best of the first objective first, then of the other baselines.

    Raises:
        UsageError: if no trial can be compared.
    """
    front, names = run.front(), {trial.number: name for name, trial in run.baselines.items()}
    on_front = {trial.number for trial in front}
    others = [t for t in run.baselines.values() if t.number not in on_front and not t.measurement.infeasible]
    if not front:
        raise UsageError(
            f"Expected a run with trials to compare, got {run.study.directory} without. Let it search on."
        )
    known = target_sparsities(feasible_baselines(run))
    rows = []
    for trial in [*front, *others]:
        note = names.get(trial.number) or _compared(trial, run.baselines, known)
        rows.append(row_of(run, trial, note, on_front=trial.number in on_front))
    return rows


def feasible_baselines(run: Run) -> dict[str, Trial]:
    """Baselines that could be measured, by name."""
    return {name: trial for name, trial in run.baselines.items() if trial.measurement.infeasible is None}


def _compared(trial: Trial, baselines: Mapping[str, Trial], known: Mapping[str, float]) -> str:
    """Ratio of the trial's loss to that of its target's baseline; "" without a target."""
    label = target_of(trial, known)
    if label is None:
        return ""
    name = references(baselines)[label]
    loss = baselines[name].measurement.values["loss"]
    ratio = trial.measurement.values["loss"] / loss if loss > 0 else None
    return "" if ratio is None else f"{ratio:.2f}x the loss of {name} in the search"


def columns(run: Run, rows: Sequence[FrontRow]) -> list[tuple[str, Callable[[FrontRow], str]]]:
    """Headings and cell texts of the columns of the front's table, as far as its rows have something to show."""

    def value(name: str) -> Callable[[FrontRow], str]:
        return lambda row: shown(name, row.values[name], absent="–")

    def loss(m: Measurement | None) -> str:
        return "" if m is None else shown("loss", m.values.get("loss"))

    def ppl(m: Measurement | None) -> str:
        return "" if m is None else shown("ppl", perplexity(m.values))

    names = [*run.objectives, *(n for n in ("sparsity",) if n not in run.objectives)]
    known = [n for n in names if all(n in row.values for row in rows)]
    found: list[tuple[str, Callable[[FrontRow], str]]] = [("trial", lambda row: str(row.trial.number))]
    if any(row.test_ratio for row in rows):
        found.append(("test loss / baseline", lambda row: row.test_ratio.text if row.test_ratio else ""))
    found.append(("test loss", lambda row: loss(row.test)))
    found.append(("test perplexity", lambda row: ppl(row.test)))
    zeros = [name for name in known if not (name == "sparsity" and run.structured)]
    found += [(objective(name).label, value(name)) for name in zeros]
    if run.structured:  # removed parts are no zeros
        found += [(f"of {of} removed", partial(_removed, of)) for of in ("blocks", "model")]
    found.append(("perplexity", lambda row: ppl(row.trial.measurement)))
    if any(row.recovered for row in rows):
        found.append(("test loss, recovered", lambda row: loss(row.recovered)))
    if run.space.shown_as:
        found.append((run.space.shown_as, lambda row: row.trial.measurement.candidate.replace(" | ", "\n")))
    return [*found, ("", lambda row: row.note)]


def _removed(of: str, row: FrontRow) -> str:
    return "–" if row.removed is None else f"{row.removed[of]:.1%}"


def as_table(run: Run, rows: Sequence[FrontRow]) -> Table:
    """Table for a terminal; baselines that are not on the front are dim."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"front of {run.study.directory}", caption=caption(run), title_justify="left")
    table.caption_justify, table.caption_style = "left", "dim"
    cells = columns(run, rows)
    for heading, _ in cells:
        is_text = heading in ("", run.space.shown_as)
        lines = "\n".join(wrap(heading, HEADING_WIDTH, break_long_words=False))
        table.add_column(lines, justify="left" if is_text else "right", no_wrap=not is_text)
    n_front = sum(row.on_front for row in rows)
    for i, row in enumerate(rows):
        texts = [Text(cell(row)) for _, cell in cells]  # as they are, not as markup
        table.add_row(*texts, style=None if row.on_front else "dim", end_section=i == n_front - 1)
    return table


def outlook(run: Run) -> str:
    """Caveat about size and speed of the pruned models."""
    return STRUCTURED if run.structured else QUALITY_STUDY


def caption(run: Run) -> str:
    """Data behind the numbers, and the outlook."""
    of, trained = run.settings.evaluator, run.fidelity.n_trained
    after = f" after training on {trained:,} tokens" if trained else ""
    return (
        f"loss: {loss_words(run)} on {run.fidelity.n_tokens:,} search tokens{after}; test: {of.test_tokens:,} "
        f"tokens; windows of {of.window}; ratios: to the target's baseline, ± 95 % over test windows\n"
        + "\n".join([*run.model_notes, outlook(run)])
    )


def loss_words(run: Run) -> str:
    """Definition of the loss, with its unit."""
    name = run.settings.evaluator.loss
    unit = loss_of(name).unit
    loss = f"{name} in {unit}" if unit else f"1 - {name}"
    n_cases = 1 + len(run.settings.space.cases)
    if n_cases == 1:
        return loss
    reference = next((text for name, text in run.study.about.baselines.items() if name != "dense"), "dense")
    return f"geometric mean over {n_cases} cases of the ratio to the loss of {reference} ({loss})"


def front_json(run: Run, rows: Sequence[FrontRow]) -> dict[str, Any]:
    """JSON of the rows, with exact values."""
    objectives = {
        name: {"unit": row.unit, "direction": row.direction}
        for name in run.objectives
        for row in [objective(name, run.settings.evaluator.loss)]
    }
    return {
        "run": str(run.study.directory),
        "fidelity": run.fidelity.text,
        "window": run.settings.evaluator.window,
        "objectives": objectives,
        "front": [row_json(row) for row in rows if row.on_front],
        "baselines": {name: trial.number for name, trial in run.baselines.items()},
        "beside": [row_json(row) for row in rows if not row.on_front],
        "label": outlook(run),
        "notes": list(run.model_notes),
    }


def row_json(row: FrontRow) -> dict[str, Any]:
    """JSON of one row."""
    m = row.trial.measurement
    return {
        "trial": row.trial.number,
        "candidate": m.candidate,
        "values": dict(row.values),
        "removed": row.removed and dict(row.removed),
        "perplexity": perplexity(m.values),
        "test": _values_json(row.test),
        "test_ratio": row.test_ratio and row.test_ratio.to_json(),
        "recovered": _values_json(row.recovered),
        "note": row.note,
    }


def _values_json(m: Measurement | None) -> dict[str, float | None] | None:
    return None if m is None else {**m.values, "perplexity": perplexity(m.values)}


def show_front(run: Run, json: bool, more: Mapping[str, Any] | None = None) -> None:
    """Print the front, and draw it into the run's directory if that can be written.

    With `json`, a document in place of a table, with the further keys of `more`.

    Raises:
        UsageError: if no trial can be compared.
    """
    from rich.console import Console

    from secateur.search.show.front_plot import plot_front

    rows = front_rows(run)
    picture, drawn = run.study.directory / "report" / "front.png", None
    try:
        plot_front(run.report_directory / picture.name, run)
        drawn = str(picture)
    except OSError as error:  # e.g. somebody else's run
        complain(f"{picture} was not written: {error.strerror}.", "warning")
    if json:
        show_json({**(more or {}), **front_json(run, rows), "picture": drawn})
        return
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width, highlight=False).print(as_table(run, rows))
    if drawn:
        show(f"picture: {drawn}")
