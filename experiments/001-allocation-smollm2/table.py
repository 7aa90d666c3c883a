"""Prints the table of the runs, and with --results writes a line for each run; lines of other runs are kept.

python table.py RUNS [--results results.jsonl]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

from secateur.search.results.run import Run, open_run
from secateur.search.show.values import spread
from secateur.search.study.study import trials_of


def describe(run: Run, budget: int) -> dict[str, object]:
    """The best candidate among the first `budget` tokens of a run, and what they cost."""
    trials = trials_of(run.study.trials, "search")
    ends = list(accumulate(t.measurement.n_tokens for t in trials))
    within = [trial for trial, end in zip(trials, ends, strict=True) if end <= budget]
    found = [
        t for t in within if t.measurement.fidelity == run.fidelity and t.measurement.values["sparsity"] > 0.5
    ]
    best = min(found, key=lambda t: t.measurement.values["loss"])
    test = run.test_of(best)
    blocks = sum(t.measurement.blocks for t in within)
    saved = sum(t.measurement.blocks_saved for t in within)
    values = best.measurement.values
    row = {
        "tokens": sum(t.measurement.n_tokens for t in within),
        "evaluations": len(within),
        "trial": best.number,
        "search_kl": values["kl"],
        "blocks_saved": saved / (blocks + saved),
        "seconds": sum(t.measurement.seconds for t in within),
        "candidate": best.measurement.candidate,
    }
    if test is not None:
        row |= {"test_kl": test.values["kl"], "test_ppl": math.exp(test.values["ce"])}
    return row


def tokens_until(run: Run, loss: float) -> int | None:
    """Tokens that a run evaluated until it had a candidate with this loss at the largest fidelity."""
    total = 0
    for trial in trials_of(run.study.trials, "search"):
        m = trial.measurement
        total += m.n_tokens
        if m.fidelity == run.fidelity and m.values["sparsity"] > 0.5 and m.values["loss"] <= loss:
            return total
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--budgets", nargs="+", type=int, default=[122880, 245760])
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    runs = {path.name: open_run(path) for path in sorted(args.runs.glob("*-[0-9]"))}
    lines, arms = [], defaultdict(list)
    for name, run in runs.items():
        spent = run.study.spent.tokens
        for budget in args.budgets:
            if spent > min(args.budgets) or budget == min(args.budgets):
                row = {"run": name, "budget": budget} | describe(run, budget)
                lines.append(row)
                arms[name.rsplit("-", 1)[0], budget].append(row)
    print(
        f"{'arm':<14} {'budget':>7} {'runs':>4} {'search KL':>22} {'test KL':>22} {'test ppl':>22} {'saved':>6}"
    )
    for (arm, budget), rows in arms.items():
        columns = [
            spread([row[key] for row in rows if isinstance(row.get(key), float)])
            for key in ("search_kl", "test_kl", "test_ppl")
        ]
        saved = statistics.median(float(row["blocks_saved"]) for row in rows)  # type: ignore[arg-type]
        print(
            f"{arm:<14} {budget:>7} {len(rows):>4} {columns[0]:>22} {columns[1]:>22} {columns[2]:>22} {saved:>6.0%}"
        )
    finals = [describe(run, 10**9) for name, run in runs.items() if name.startswith("evolution")]
    if finals:
        target = min(float(row["search_kl"]) for row in finals)  # type: ignore[arg-type]
        for name, run in runs.items():
            print(f"{name}: {tokens_until(run, target)} tokens until search KL {target:.4f}")
    if args.results:
        old = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
        others = [row for row in map(json.loads, old) if row["run"] not in runs]
        args.results.write_text("".join(json.dumps(row) + "\n" for row in lines + others), encoding="utf-8")


if __name__ == "__main__":
    main()
