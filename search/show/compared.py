"""Comparison of runs, printed for people or as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.search.controller import Trial
from secateur.search.objectives import objective
from secateur.search.results.compare import ComparedRow, Spread
from secateur.search.results.run import Run
from secateur.search.show.grid import Grid
from secateur.search.show.values import shown

CAPTION = (
    "Best model of each run by its search loss. Mean ± standard deviation over runs; of a run alone, the ratio ± 95 % "
    "over test windows. Differences: to the first row of the target, ± 95 % over test windows (by seed: ± deviation)."
)
MERGED = (
    "Front by the values on the test text. Chosen there, it is too good by that choice: compare on further text before "
    "a claim."
)


def compared_grid(rows: Sequence[ComparedRow]) -> Grid:
    """Table of a comparison: the test ratio first, the search beside it."""
    by_seed = any(row.over_seeds for row in rows)
    differs = any(row.over_windows for row in rows)
    headings = [
        "runs",
        "target",
        "n",
        "test loss / baseline",
        "test loss",
        "test perplexity",
        "search / baseline",
    ]
    headings += ["difference of test loss"] * differs + ["by seed"] * by_seed
    found = []
    for row in rows:
        cells = [row.name, row.target, str(len(row.found)), _ratio(row), spread_text(row.test_loss, "loss")]
        cells += [spread_text(row.perplexity, "ppl"), spread_text(row.search_ratio)]
        gap, of_seeds = row.over_windows, row.over_seeds
        cells += [_signed(gap.value, gap.half) if gap else "–"] * differs
        cells += [_signed(of_seeds.mean, of_seeds.deviation) if of_seeds else "–"] * by_seed
        found.append(cells)
    return Grid(headings, found, CAPTION, n_text=2)


def merged_grid(runs: Sequence[Run], front: Sequence[tuple[Run, Trial]]) -> Grid:
    """Table of the front of several runs."""
    names = runs[0].objectives
    headings = ["run", "trial", *(f"test {objective(name).label}" for name in names)]
    rows = [
        [
            str(run.study.directory),
            _searched(run, trial),
            *(shown(n, trial.measurement.values[n]) for n in names),
        ]
        for run, trial in front
    ]
    return Grid(headings, rows, MERGED, n_text=1)


def compared_json(rows: Sequence[ComparedRow]) -> list[dict[str, Any]]:
    """Exact values of a comparison."""
    return [
        {
            "name": row.name,
            "target": row.target,
            "runs": [
                {
                    "run": str(x.run.study.directory),
                    "seed": x.run.settings.seed,
                    "trial": x.trial.number,
                    "test_loss": x.test.values["loss"],
                    "test_ratio": x.ratio and x.ratio.to_json(),
                    "search_ratio": x.search_ratio,
                }
                for x in row.found
            ],
            "test_ratio": row.test_ratio and vars(row.test_ratio),
            "test_loss": row.test_loss and vars(row.test_loss),
            "search_ratio": row.search_ratio and vars(row.search_ratio),
            "difference": row.over_windows and row.over_windows.to_json(),
            "difference_by_seed": row.over_seeds and vars(row.over_seeds),
        }
        for row in rows
    ]


def merged_json(front: Sequence[tuple[Run, Trial]]) -> list[dict[str, Any]]:
    """Exact values of the front of several runs."""
    return [
        {
            "run": str(run.study.directory),
            "trial": int(_searched(run, trial)),
            "candidate": trial.measurement.candidate,
            "test": dict(trial.measurement.values),
        }
        for run, trial in front
    ]


def _searched(run: Run, trial: Trial) -> str:
    """Number of the trial of the search with the candidate of a test measurement."""
    return str(run.as_searched([trial])[0].number)


def _ratio(row: ComparedRow) -> str:
    """Spread over runs; of one run its own interval."""
    [first, *others] = row.found
    return first.ratio.text if not others and first.ratio is not None else spread_text(row.test_ratio)


def spread_text(spread: Spread | None, name: str = "") -> str:
    """Mean, ± the deviation of several, in the unit of a value's name; a dash for none."""
    if spread is None:
        return "–"
    text = shown(name, spread.mean) if name else f"{spread.mean:.3f}"
    if spread.deviation is None:
        return text
    return f"{text} ± {shown(name, spread.deviation) if name else f'{spread.deviation:.3f}'}"


def _signed(value: float, half: float | None) -> str:
    return f"{value:+.4f}" + ("" if half is None else f" ± {half:.4f}")
