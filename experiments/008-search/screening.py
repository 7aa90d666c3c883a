"""Recipes screened by their proxy against all measured, on `tiny`: what a search finds, and what it costs.

    python screening.py WORK [--seeds 0 1 2 3 4] [--evaluations 40]

Rows go to screening.jsonl as they come; those that are there are not made again. Every arm but one has the same
number of measured recipes and of evaluated tokens; CPU seconds count the prunings that the proxy asks for, too. Test
loss: of the best recipe by the search loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from secateur.search import app
from secateur.search.controllers.proxy_screening import spearman
from secateur.search.results.run import Run, open_run
from secateur.search.settings.settings import settings_from
from secateur.search.show.values import spread

ROWS = Path(__file__).parent / "screening.jsonl"

LONGER, FACTOR = "evolution, four times the recipes", 4
"""About the CPU time of the screened arm."""

ARMS: dict[str, dict[str, Any]] = {
    "random": {"kind": "random"},
    "optuna": {"kind": "optuna"},
    "evolution": {"kind": "evolution", "offspring": 4},
    LONGER: {"kind": "evolution", "offspring": 4},
    "evolution, screened": {"kind": "evolution", "offspring": 4, "screening": {"oversampling": 8}},
}


def settings(arm: str, seed: int, n_evaluations: int) -> dict[str, Any]:
    return {
        "model": "tiny",
        "space": {
            "kind": "recipe",
            "unit": "weights",
            "target": 0.6,
            "start": "wanda",
            "known": [],
            "pool_tokens": 8192,
            "samples": [4, 8, 16],
            "length": [64, 128],
            "proxy": {"blocks": 3},
        },
        "controller": ARMS[arm],
        "evaluator": {"window": 128, "fidelities": [2048], "test_tokens": 4096, "calibration_tokens": 4096},
        "budget": {"evaluations": n_evaluations * (FACTOR if arm == LONGER else 1)},
        "seed": seed,
    }


def correlation(run: Run) -> float | None:
    """Rank correlation of the proxy with the loss, of recipes that have both."""
    by_part: dict[str, dict[str, float]] = {"proxy": {}, "search": {}}
    for trial in run.study.trials:
        m = trial.measurement
        if m.infeasible is None and m.fidelity.part in by_part:
            by_part[m.fidelity.part][m.candidate] = m.values["loss"]
    both = [c for c in by_part["search"] if c in by_part["proxy"]]
    if len(both) < 10:
        return None
    return float(spearman(*([by_part[part][c] for c in both] for part in ("proxy", "search"))))


def row_of(arm: str, seed: int, n_evaluations: int, directory: Path) -> dict[str, Any]:
    started = time.process_time()
    app.search(settings_from(settings(arm, seed, n_evaluations)), directory)
    seconds = time.process_time() - started
    run = open_run(directory)
    fits = [
        trial
        for trial in run.study.trials
        if trial.measurement.infeasible is None
        and trial.measurement.fidelity == run.fidelity
        and trial.measurement.values["sparsity"] > 0.5
    ]
    best = min(fits, key=lambda trial: trial.measurement.values["loss"])
    test = run.test_of(best)
    return {
        "arm": arm,
        "seed": seed,
        "evaluations": n_evaluations,
        "recipe": best.measurement.candidate,
        "search_kl": best.measurement.values["loss"],
        "test_kl": None if test is None else test.values["loss"],
        "screened": sum(t.measurement.fidelity.part == "proxy" for t in run.study.trials),
        "correlation": correlation(run),
        "cpu_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--evaluations", type=int, default=40)
    args = parser.parse_args()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for seed in args.seeds:
        for arm in ARMS:
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                row = row_of(
                    arm,
                    seed,
                    args.evaluations,
                    args.work / f"{arm.replace(',', '').replace(' ', '-')}-{seed}",
                )
                rows.append(row)
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print("| controller | seeds | search KL | test KL | screened | rank correlation | CPU seconds |")
    print("|---|---:|---|---|---:|---|---|")
    for arm in ARMS:
        of = [row for row in rows if row["arm"] == arm]
        columns = {key: [row[key] for row in of if row[key] is not None] for key in of[0]}
        print(
            f"| {arm} | {len(of)} | {spread(columns['search_kl'])} | {spread(columns['test_kl'])} | "
            f"{statistics.median(columns['screened']):.0f} | {spread(columns['correlation'], '.2f')} | "
            f"{spread(columns['cpu_seconds'], '.0f')} |"
        )


if __name__ == "__main__":
    main()
