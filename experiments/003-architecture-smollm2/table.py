"""Prints the table of the runs, on the test part; with --tokens each model is exported and trained for a moment, too.

    python table.py RUNS [--tokens 8192] [--results results.jsonl]

A row is the best candidate of an arm at the target at the largest fidelity, or a baseline of the uniform arm. With
--tokens it is pruned once more sequentially, and all are trained equally: every parameter, distilled from the dense
model, on the calibration part. What was done is kept in the results and not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from secateur.search.controller import Trial
from secateur.search.run import Run, open_run

TARGET = 0.25


def rows_of(name: str, run: Run) -> Iterator[tuple[str, Trial]]:
    """The rows that a run gives, by arm."""
    arm = name.rsplit("-", 1)[0]
    if arm == "uniform":
        for label, trial in run.baselines.items():
            if label.endswith(f"@{TARGET}"):
                yield label.partition("@")[0], trial
    elif arm != "front":
        given = {trial.measurement.candidate for trial in run.baselines.values()}
        found = [
            trial
            for trial in run.study.trials
            if trial.measurement.fidelity == run.fidelity
            and trial.measurement.candidate not in given
            and abs(trial.measurement.values.get("sparsity", 0) - TARGET) < 0.02
        ]
        yield arm, min(found, key=lambda t: t.measurement.values["loss"])


def recovered(run: Run, candidate: str, n_tokens: int) -> dict[str, float]:
    """Losses on the test windows of the exported model before and after training."""
    from secateur.evaluators.recovery import RecoveryJob, make_trainer, open_pruned
    from secateur.evaluators.training.recipe import Recipe
    from secateur.evaluators.training.validation import Validation
    from secateur.search.app.bench import plan

    recipe = Recipe(method="full", loss="kl", tokens=n_tokens, batch=2)
    job = RecoveryJob(plan(run.settings), candidate, sequential=True, recipe=recipe, threads=1)
    bench, dense = open_pruned(job, lambda line: None)
    test = Validation(dense, bench.windows["test"])
    before = test.losses(bench.anatomy)
    trainer = make_trainer(bench, dense, job)
    trainer.train(trainer.n_steps)
    after = test.losses(bench.anatomy)
    values = {f"{key}_exported": value for key, value in before.items()}
    return values | {f"{key}_recovered": value for key, value in after.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.jsonl")
    args = parser.parse_args()
    text = args.results.read_text(encoding="utf-8") if args.results.exists() else ""
    known = {
        (row["run"], row["arm"], row["candidate"], row["tokens"]): row
        for row in map(json.loads, text.splitlines())
    }
    arms = defaultdict(list)
    for path in sorted(args.runs.glob("*-[0-9]")):
        run = open_run(path)
        for arm, trial in rows_of(path.name, run):
            m, key = trial.measurement, (path.name, arm, trial.measurement.candidate, args.tokens)
            if key not in known:
                test = run.test_of(trial)
                row = dict(zip(("run", "arm", "candidate", "tokens"), key, strict=True))
                row |= {
                    "search_kl": m.values["kl"],
                    "params": m.values["params"],
                    "sparsity": m.values["sparsity"],
                }
                row |= {"spent": run.study.spent.tokens}
                row |= (
                    {} if test is None else {f"{name}_searched": test.values[name] for name in ("kl", "ce")}
                )
                row |= recovered(run, m.candidate, args.tokens) if args.tokens else {}
                known[key] = row
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            arms[arm].append(known[key])
    stages = ("searched", "exported", "recovered") if args.tokens else ("searched",)
    heads = [f"{stage}: test KL | perplexity" for stage in stages]
    print(f"| arm | runs | tokens | search KL | {' | '.join(heads)} | M parameters |")
    print("|---|---:|---:|---:|" + "---:|---:|" * len(stages) + "---:|")
    for arm, rows in sorted(arms.items(), key=lambda item: -middle(item[1], "search_kl")):
        cells = [spread([row["search_kl"] for row in rows])]
        for stage in stages:
            cells.append(spread([row[f"kl_{stage}"] for row in rows if f"kl_{stage}" in row]))
            cells.append(
                spread([math.exp(row[f"ce_{stage}"]) for row in rows if f"ce_{stage}" in row], ".1f")
            )
        spent, params = middle(rows, "spent"), middle(rows, "params") / 1e6
        print(f"| {arm} | {len(rows)} | {spent:,.0f} | {' | '.join(cells)} | {params:.1f} |")


def middle(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def spread(values: list[float], form: str = ".3f") -> str:
    """Median and range; nothing for what was not measured, such as the test loss of what is on no front."""
    if not values:
        return "–"
    text = f"{statistics.median(values):{form}}"
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
