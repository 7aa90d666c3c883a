"""Expert pruning on tiny-moe: which experts go, merging, and a search over how many each block keeps.

    python moe.py RUNS [--arms reap search-frequency] [--seeds 0 1 2]

Arms without `search` remove the same number of experts of each block, as nearly as whole numbers allow. A run that is
there is continued. After each one its rows take their place in moe.jsonl, and the table in README.md is written anew,
both beside this script.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from secateur.search import app
from secateur.search.results.run import Run, open_run
from secateur.search.settings.settings import load_settings
from secateur.search.show.values import spread

HERE = Path(__file__).parent
TARGETS = {0.214233: "25 %", 0.428466: "50 %"}
UNIFORM = ["controller.kind=uniform"]
SEARCH = [
    "controller.kind=evolution",
    "controller.offspring=8",
    "controller.survivors=[2]",
    "controller.start=sensitivity",
    "budget.tokens=50000",
]
IMPORTANCES = ("reap", "frequency", "mean_gate", "easy_ep", "nae")
ARMS = {
    **{name: [*UNIFORM, f"space.expert_importance={name}"] for name in IMPORTANCES},
    "reap+hc_smoe": [*UNIFORM, "space.repair=hc_smoe"],
    **{
        f"{importance}+{name}": [*UNIFORM, f"space.expert_importance={importance}", f"space.repair={name}"]
        for importance in ("reap", "frequency")
        for name in ("ream", "mc_smoe")
    },
    **{f"search-{name}": [*SEARCH, f"space.expert_importance={name}"] for name in IMPORTANCES},
}
TABLE = re.compile("(?<=<!-- moe -->\n).*?(?=<!-- end -->)", re.DOTALL)


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
    """Markdown: median and range over the seeds, and how far the median of the test KL is from uniform REAP's."""
    yield "| experts removed | arm | seeds | search KL | test KL | against `reap` | test perplexity | M parameters |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    groups = defaultdict(list)
    for row in rows:
        groups[row["experts"], "dense" if row["experts"] == "none" else row["arm"]].append(row)
    for (share, arm), of in groups.items():
        search, test = ([row[f"{text}_kl"] for row in of] for text in ("search", "test"))
        reap = [row["test_kl"] for row in groups.get((share, "reap"), ())]
        against = f"{median(test) / median(reap) - 1:+.0%}" if reap and arm != "reap" else ""
        ppl = spread([math.exp(row["test_ce"]) for row in of], ".1f")
        numbers = f"{spread(search, '.3f')} | {spread(test, '.3f')} | {against} | {ppl}"
        yield f"| {share} | {arm} | {len(of)} | {numbers} | {of[0]['params'] / 1e6:.2f} |"


def write(rows: list[dict[str, Any]]) -> None:
    """Write the rows, and the table in the README."""
    shares = ("none", *TARGETS.values())
    rows.sort(key=lambda row: (shares.index(row["experts"]), list(ARMS).index(row["arm"]), row["seed"]))
    (HERE / "moe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    readme = HERE / "README.md"
    text = TABLE.sub(lambda _: "\n".join([*table(rows), ""]), readme.read_text(encoding="utf-8"))
    readme.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    lines = (HERE / "moe.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for arm in args.arms:
        for seed in args.seeds:
            seeds = [f"seed={seed}", f"evaluator.seed={seed}"]  # of the proposals, and of the windows
            directory = args.runs / f"{arm}-{seed}"
            app.search_in_lines(load_settings(HERE / "moe.yaml", [*ARMS[arm], *seeds]), directory)
            rows = [row for row in rows if (row["arm"], row["seed"]) != (arm, seed)]
            rows += rows_of(arm, seed, open_run(directory))
            write(rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
