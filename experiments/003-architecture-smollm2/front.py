"""Prints the front of the search for several targets: what was found for each of them, beside FLAP's and the uniform.

    python front.py RUNS/front-0 [--results results.jsonl]

Test part; latencies are predicted, as shares of the dense model's. Rows are appended to the results.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from secateur.search.controller import Trial
from secateur.search.results.run import Run, open_run

NEAR = 0.01
LATENCIES = ("latency_prefill", "latency_decode")


def best_at(run: Run, target: float) -> Trial:
    """The trial with the lowest search loss near the target that no baseline is."""
    given = {trial.measurement.candidate for trial in run.baselines.values()}
    near = [
        trial
        for trial in run.trials()
        if trial.measurement.candidate not in given
        and abs(trial.measurement.values["sparsity"] - target) < NEAR
    ]
    return min(near, key=lambda trial: trial.measurement.values["loss"])


def row(run: Run, name: str, target: float, trial: Trial) -> dict[str, Any]:
    """What the table and the results have of a trial."""
    values, test = trial.measurement.values, run.test_of(trial)
    dense = run.baselines["dense"].measurement.values
    found = {
        "run": run.study.directory.name,
        "arm": name,
        "candidate": trial.measurement.candidate,
        "tokens": 0,
    }
    found |= {"target": target, "search_kl": values["kl"], "params": values["params"]}
    found |= {latency: values[latency] / dense[latency] for latency in LATENCIES}
    return found | (
        {} if test is None else {"kl_searched": test.values["kl"], "ce_searched": test.values["ce"]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    run = open_run(args.run)
    targets = sorted({float(name.partition("@")[2]) for name in run.baselines if "@" in name})
    print(
        "| removed | M parameters | prefill | decode | found: test KL | perplexity | FLAP: test KL | perplexity | "
        "uniform: test KL |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for target in targets:
        trials = {"found": best_at(run, target)}
        trials |= {name: run.baselines[f"{name}@{target:g}"] for name in ("flap", "uniform")}
        rows = {name: row(run, name, target, trial) for name, trial in trials.items()}
        found = rows["found"]
        cells = [f"{target:.0%}", f"{found['params'] / 1e6:.1f}", *(f"{found[x]:.2f}" for x in LATENCIES)]
        for name, values in rows.items():
            kl, ce = values.get("kl_searched"), values.get("ce_searched")
            cells.append("–" if kl is None else f"{kl:.3f}")
            if name != "uniform":
                cells.append("–" if ce is None else f"{math.exp(ce):.1f}")
        print(f"| {' | '.join(cells)} |")
        if args.results:
            with args.results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(each) + "\n" for each in rows.values())


if __name__ == "__main__":
    main()
