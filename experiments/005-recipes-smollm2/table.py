"""Prints the tables of the runs: the best recipe of each arm, and every known method with its own defaults.

    python table.py RUNS [--known DIR] [--tasks DIR] [--samples 200] [--best 3] [--results results.jsonl]

Losses are those of the test part, at the target. Known methods are those of `known.yaml`, whose runs of this model are
named by --known, as `DIR/NAME-{unit}`: NAME. With --tasks the best recipe of each arm and the best known methods
are measured in PIQA, too, from the files in this directory. What was done is kept in the results and not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.search.controller import Trial
from secateur.search.results.run import Run, open_run
from secateur.search.show.values import spread

TASK = "piqa-local"
"""As in docs/how-to/tasks.md."""


def rows_of(name: str, run: Run) -> Iterator[tuple[str, Trial]]:
    """The rows that a run gives, by arm or by the method's name."""
    if run.settings.controller.kind == "uniform":
        for label, trial in run.baselines.items():
            yield f"known: {label.partition('@')[0]}", trial
        return
    dense = run.baselines["dense"]
    found = [t for t in run.trials() if t.measurement.candidate != dense.measurement.candidate]
    yield name.split("-")[1], min(found, key=lambda trial: trial.measurement.values["loss"])


class Tasks:
    """Measures candidates of runs in PIQA.

    Args:
        directory: of the task's files.
        samples: of it.
        runs: directory of the runs.
    """

    def __init__(self, directory: Path, samples: int, runs: Path) -> None:
        self._directory, self._samples, self._runs = directory, samples, runs
        self._evaluators: dict[Path, Any] = {}
        self._found: dict[tuple[Path, str], dict[str, float]] = {}  # arms may end with the same recipe

    def accuracy(self, name: str, run: Run, candidate: str) -> dict[str, float]:
        """Of one candidate, by the task's name."""
        unit = name.partition("-")[0]
        levels = run.study.directory / "levels"  # of known methods; arms share theirs
        levels = levels if levels.is_dir() else self._runs / f"levels-{unit}"
        if levels not in self._evaluators:
            self._evaluators[levels] = self._evaluator(levels, run)
        if (levels, candidate) not in self._found:
            evaluator, fidelity = self._evaluators[levels]
            [found] = evaluator.evaluate([candidate], fidelity)
            values = {key: value for key, value in found.values.items() if key.startswith("task:")}
            self._found[levels, candidate] = values
        return self._found[levels, candidate]

    def _evaluator(self, levels: Path, run: Run) -> tuple[Any, Any]:
        from dataclasses import replace

        from secateur.evaluators.session import Session, set_threads
        from secateur.evaluators.tasks.task_set import TaskPlan
        from secateur.search.app.session import plan

        set_threads(1)
        known = plan(run.settings)
        tasks = TaskPlan((TASK,), self._directory, self._samples)
        session = Session(replace(known, tasks=tasks), print)
        session.build_levels(levels)
        return session.evaluator(levels), known.fidelities[-2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--known", type=Path)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument(
        "--best", type=int, default=3, help="so many known methods in tasks, the dense model too"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.jsonl")
    args = parser.parse_args()
    text = args.results.read_text(encoding="utf-8") if args.results.exists() else ""
    known = {(row["run"], row["candidate"]): row for row in map(json.loads, text.splitlines())}
    rows: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    tasks = Tasks(args.tasks, args.samples, args.runs) if args.tasks else None
    paths = {path.name: path for path in sorted(args.runs.glob("*-*-[0-9]"))}
    if args.known:
        of_units = {f"{unit}-known": Path(f"{args.known}-{unit}") for unit in ("structure", "weights")}
        paths |= {name: path for name, path in of_units.items() if path.is_dir()}
    for name, path in paths.items():
        run, unit = open_run(path), name.partition("-")[0]
        found = list(rows_of(name, run))
        best = sorted(found, key=lambda pair: pair[1].measurement.values["loss"])[: args.best]
        for arm, trial in found:
            candidate, test = trial.measurement.candidate, run.test_of(trial)
            row = known.get((name, candidate))
            if row is None or (tasks and (arm, trial) in best and f"task:{TASK}" not in row):
                row = {"run": name, "arm": arm, "candidate": candidate}
                row |= {"search_kl": trial.measurement.values["kl"]}
                if test is not None and test.infeasible is None:
                    row |= {name: test.values[name] for name in ("kl", "ce", "sparsity")}
                if tasks and (arm, trial) in best:
                    row |= tasks.accuracy(name, run, candidate)
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            rows[unit][arm].append(row)
    for unit, arms in rows.items():
        show(unit, arms)


def show(unit: str, arms: dict[str, list[dict]]) -> None:
    """One unit's table, the best first."""
    print(
        f"\n{unit}\n\n| arm | runs | search KL | test KL | test perplexity | PIQA |\n|---|---:|---:|---:|---:|---:|"
    )
    for arm, rows in sorted(
        arms.items(), key=lambda item: statistics.median(r["search_kl"] for r in item[1])
    ):
        cells = [spread([row["search_kl"] for row in rows], ".3f")]
        cells.append(spread([row["kl"] for row in rows if "kl" in row], ".3f"))
        cells.append(spread([math.exp(row["ce"]) for row in rows if "ce" in row], ".1f"))
        cells.append(spread([row[f"task:{TASK}"] for row in rows if f"task:{TASK}" in row], ".3f"))
        print(f"| {arm} | {len(rows)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
