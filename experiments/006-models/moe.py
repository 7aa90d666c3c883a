"""Expert pruning on tiny-moe: which experts go, merging, and a search over how many each block keeps.

    python moe.py RUNS [--seeds 0 1 2]

Every arm but `search` removes the same number of experts of each block, as nearly as whole numbers allow. A run that
is there is continued. Prints a table, and writes moe.jsonl beside this script.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.search import app
from secateur.search.results.run import Run, open_run
from secateur.search.settings.settings import load_settings
from secateur.search.show.values import spread

HERE = Path(__file__).parent
TARGETS = {0.214233: "25 %", 0.428466: "50 %"}
UNIFORM = ["controller.kind=uniform"]
IMPORTANCES = ("reap", "frequency", "mean_gate", "easy_ep", "nae")
ARMS = {
    **{name: [*UNIFORM, f"space.expert_importance={name}"] for name in IMPORTANCES},
    **{f"reap+{name}": [*UNIFORM, f"space.repair={name}"] for name in ("ream", "mc_smoe", "hc_smoe")},
    "search": [
        "controller.kind=evolution",
        "controller.offspring=8",
        "controller.survivors=[2]",
        "controller.start=sensitivity",
        "budget.tokens=50000",
    ],
}


def rows_of(arm: str, seed: int, run: Run) -> Iterator[dict[str, Any]]:
    """The dense model, and the best candidate of each target by the search loss, on the search and test parts."""
    found = {"dense": run.baselines["dense"]} if arm == "reap" else {}
    for target, share in TARGETS.items():
        fitting = [
            trial
            for trial in run.study.trials
            if trial.measurement.fidelity == run.fidelity
            and abs(trial.measurement.values["sparsity"] - target) < 0.02
        ]
        found[share] = min(fitting, key=lambda trial: trial.measurement.values["loss"])
    for share, trial in found.items():
        test, m = run.test_of(trial), trial.measurement
        yield {
            "arm": arm,
            "seed": seed,
            "experts": "none" if share == "dense" else share,
            "candidate": m.candidate,
            "search_kl": m.values["kl"],
            "params": m.values["params"],
            "tokens": run.study.spent.tokens,
            **({f"test_{name}": test.values[name] for name in ("kl", "ce")} if test else {}),
        }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: median and range over the seeds."""
    yield "| experts removed | arm | search KL | test KL | test perplexity | M parameters |"
    yield "|---|---|---:|---:|---:|---:|"
    groups = defaultdict(list)
    for row in rows:
        groups[row["experts"], "dense" if row["experts"] == "none" else row["arm"]].append(row)
    for (share, arm), of in groups.items():
        kls, tests = [row["search_kl"] for row in of], [row["test_kl"] for row in of if "test_kl" in row]
        ppl = [math.exp(row["test_ce"]) for row in of if "test_ce" in row]
        numbers = (spread(kls, ".3f"), spread(tests, ".3f"), spread(ppl, ".1f"))
        yield f"| {share} | {arm} | {' | '.join(numbers)} | {of[0]['params'] / 1e6:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    rows = []
    for arm in args.arms:
        for seed in args.seeds:
            seeds = [f"seed={seed}", f"evaluator.seed={seed}"]  # of the proposals, and of the windows
            directory = args.runs / f"{arm}-{seed}"
            app.search_in_lines(load_settings(HERE / "moe.yaml", [*ARMS[arm], *seeds]), directory)
            rows += rows_of(arm, seed, open_run(directory))
    rows.sort(key=lambda row: ("none", *TARGETS.values()).index(row["experts"]))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (HERE / "moe.jsonl").write_text(text, encoding="utf-8")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
