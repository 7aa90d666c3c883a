"""Models of a run in detail, for its report: values, allocation, and the command that exports one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.search.controller import Trial
from secateur.search.objectives import objective
from secateur.search.results.run import Run
from secateur.search.results.targets import best_by_target, target_sparsities
from secateur.search.show.front_plot import MOST_POINTS, FrontPoints
from secateur.search.show.front_table import FrontRow, feasible_baselines, row_of
from secateur.search.show.plots import allocation_grid
from secateur.search.show.values import perplexity, shown

MOST_CELLS = 40_000
"""Most cells of all allocations of a page: about a megabyte."""

MOST_DETAILS = 300
"""Most models in detail on a page."""


@dataclass(frozen=True)
class Heat:
    """Shares removed as a table, in whole percent.

    Args:
        blocks: numbers of the blocks, the columns.
        rows: percentages of a projection or sub-layer in each block by its name; None where a block has none.
    """

    blocks: Sequence[int]
    rows: Mapping[str, Sequence[int | None]]

    @property
    def n_cells(self) -> int:
        return len(self.blocks) * len(self.rows)


@dataclass(frozen=True)
class Detail:
    """One model.

    Args:
        number: of its trial.
        title: one line: its cost and loss.
        note: name of a baseline or ratio to its target's baseline.
        values: texts on the search text and on the test text, by name.
        heat: its allocation; None where it is known only after pruning, or is one number.
        candidate: its text.
        command: that exports it.
    """

    number: int
    title: str
    note: str
    values: Mapping[str, tuple[str, str]]
    heat: Heat | None
    candidate: str
    command: str


def details(run: Run, rows: Sequence[FrontRow], asked: Trial) -> tuple[list[Detail], list[Detail]]:
    """Models of the table and `asked`, and further ones of the lowest losses as far as there is room.

    The best of each target come before the further ones.
    """
    first = {row.trial.number: row for row in rows}
    best = best_by_target(run.trials(), target_sparsities(feasible_baselines(run))).values()
    for trial in (asked, *best):
        first.setdefault(trial.number, row_of(run, trial))
    listed = [_detail(run, row) for row in first.values()]
    n_cells = max((d.heat.n_cells for d in listed if d.heat is not None), default=0)
    room = min(MOST_DETAILS, MOST_CELLS // max(1, n_cells)) - len(listed)
    others = [t for t in FrontPoints(run).trials if t.number not in first]
    others.sort(key=lambda trial: trial.measurement.values["loss"])
    kept = sorted(others[: max(0, room)], key=lambda trial: trial.number)
    return listed, [_detail(run, row_of(run, trial)) for trial in kept]


def titles(run: Run) -> dict[int, str]:
    """Line of each trial that is a shape of its own in the picture of the front, by number."""
    points = FrontPoints(run)
    kinds = [points.pruned, points.partial, points.front, list(run.baselines.values())]
    tests = {trial.number: value for trial, value in points.tested}
    found = {}
    for trial in (t for kind in kinds if len(kind) <= MOST_POINTS for t in kind):
        found[trial.number] = f"Trial {trial.number}: {_title(run, trial)}"
        if trial.measurement.fidelity != run.fidelity:
            found[trial.number] += f", on {trial.measurement.fidelity.n_tokens:,} tokens alone"
        if trial.number in tests:
            found[trial.number] += f", on the test text {shown(points.y, tests[trial.number])}"
        if trial.number in points.names:
            found[trial.number] += f" ({points.names[trial.number]})"
    return found


def _title(run: Run, trial: Trial) -> str:
    """Cost and loss of a trial in one line."""
    values, points = run.values_of(trial), FrontPoints(run)
    names = dict.fromkeys((points.x, points.y, "loss"))
    return ", ".join(f"{objective(name).label} {shown(name, values.get(name), absent='–')}" for name in names)


def export_command(run: Run, number: int) -> str:
    """Command line that exports a trial."""
    directory = str(run.study.directory)
    return shlex.join(
        ["secateur", "export", directory, str(number), "--to", f"{directory.rstrip('/')}-trial-{number}"]
    )


def _detail(run: Run, row: FrontRow) -> Detail:
    trial, test = row.trial, row.test if row.test and not row.test.infeasible else None
    tested = {} if test is None else test.values
    values = {
        _name(name): (shown(name, value, absent="–"), shown(name, tested.get(name)))
        for name, value in row.values.items()
        if name not in ("kl", "loss") or name == "loss"
    }
    if row.test_ratio is not None:
        values[f"loss / {row.test_ratio.of}"] = "", row.test_ratio.text
    ppl = perplexity(trial.measurement.values)
    if ppl is not None:
        values["perplexity"] = shown("ppl", ppl), shown("ppl", perplexity(tested))
    return Detail(
        trial.number,
        _title(run, trial),
        row.note,
        values,
        heat_of(run, trial),
        trial.measurement.candidate,
        export_command(run, trial.number),
    )


def _name(name: str) -> str:
    try:
        return objective(name).label
    except ValueError:
        return name


def heat_of(run: Run, trial: Trial) -> Heat | None:
    """Allocation of a trial; sub-layers in place of projections where all projections of each have the same share.

    None where it is known only after pruning, or is not what is searched for, as with formulas.
    """
    shares, linears = run.allocation(trial), run.study.about.facts["shape"]["linears"]
    if not shares or run.space.shown_as:
        return None
    places = {linear["name"]: (linear["block"], linear["sublayer"]) for linear in linears}
    found = dict[tuple[int, str], set[float]]()
    for name, place in places.items():
        found.setdefault(place, set()).add(shares.get(name, 0.0))
    if all(len(values) == 1 for values in found.values()):
        linears = [
            {"name": f".{block}.{sublayer}", "block": block, "n_weights": 1}
            for block, sublayer in dict.fromkeys(places.values())
        ]
        shares = {f".{block}.{sublayer}": min(values) for (block, sublayer), values in found.items()}
    grid, names = allocation_grid(shares, linears)
    cells = [[None if np.isnan(value) else round(100 * float(value)) for value in row] for row in grid]
    return Heat(sorted({linear["block"] for linear in linears}), dict(zip(names, cells, strict=True)))
