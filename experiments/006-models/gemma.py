"""Gemma 3 270M: shares of weights, a smaller model, and recipes, each against the uniform and published ways.

    python gemma.py RUNS [--studies allocation-50 ...] [--arms ...] [--seeds 0 1 2] [--text FILE] [--commit]

A run that is there is continued; one whose rows are in gemma.jsonl is not made again. After each run its rows go there,
and the table in gemma.md is written anew; with `--commit` git takes both. Arms of one study share their level store and
have the same budget of evaluated tokens, of recipes 24 evaluations. Arms that draw nothing have one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
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
ROWS, TABLE = HERE / "gemma.jsonl", HERE / "gemma.md"
WEIGHTS = "kind: allocation, metric: sparsegpt, granularity: linear, step: 0.1, max_sparsity: 0.9"
STUDIES = {
    "allocation-50": f"{{{WEIGHTS}, target: 0.5}}",
    "allocation-60": f"{{{WEIGHTS}, target: 0.6}}",
    "architecture-20": "{kind: architecture, target: 0.2, units: [groups, heads, channels, attention, mlp], "
    "importance: wanda_sp, repair: obs, statistics: dense}",
    "recipe-50": "{kind: recipe, unit: weights, target: 0.5, start: admm, known: [admm_gradual], length: [128], "
    "samples: [32, 128], choose: [random], subsets: 1, cache_gb: 20}",
}
PUBLISHED = "wanda, ria, gblm, pruner-zero, sparsegpt, admm_gradual, dsnot, owl, owl_released, dlp, alphapruning, besa"
"""Recipes that prune at once; those that train, SparseLLM and The LLM Surgeon take longer than all of them."""
RECIPES = ["budget={evaluations: 24}", "evaluator.fidelities=[2048]"]
EVOPRESS = [
    "controller.kind=evolution",
    "controller.start=uniform",
    "controller.offspring=8",
    "controller.survivors=[2]",
]
OF_LEVELS = {
    "uniform": (["controller.kind=uniform"], [0]),
    "sensitivity": (["controller.kind=sensitivity"], [0]),
    "evolution": (EVOPRESS, [0, 1, 2]),
    "default": ([], [0, 1, 2]),
}
"""Overrides, and seeds: `evolution` is EvoPress's search (arXiv 2410.14649) with our levels."""
ARMS = {
    **dict.fromkeys(("allocation-50", "allocation-60", "architecture-20"), OF_LEVELS),
    "recipe-50": {
        "published": (
            ["controller.kind=random", "budget={evaluations: 1}", f"space.known=[{PUBLISHED}]"],
            [0],
        ),
        "random": (["controller.kind=random", *RECIPES], [0, 1, 2]),
        "default": (RECIPES, [0, 1, 2]),
    },
}


def rows_of(study: str, arm: str, seed: int, run: Run) -> Iterator[dict[str, Any]]:
    """The dense model and known candidates, of an arm that searches nothing; else the best one by the search loss."""
    found = dict(run.baselines) if arm in ("uniform", "published") else {}
    fits = [
        trial
        for trial in run.study.trials
        if trial.measurement.infeasible is None
        and trial.measurement.fidelity == run.fidelity
        and trial.measurement.values["sparsity"] > 0
    ]
    if arm not in ("uniform", "published"):
        found["found"] = min(fits, key=lambda trial: trial.measurement.values["loss"])
    for name, trial in found.items():
        if trial.measurement.infeasible is not None:
            continue
        test, m = run.test_of(trial), trial.measurement
        yield {
            "study": study,
            "arm": arm,
            "seed": seed,
            "name": name,
            "candidate": m.candidate,
            "sparsity": m.values["sparsity"],
            "search_kl": m.values["kl"],
            "tokens": run.study.spent.tokens,
            **({f"test_{value}": test.values[value] for value in ("kl", "ce")} if test else {}),
        }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: median and range over the seeds."""
    yield "| study | candidate | seeds | sparsity | search KL | test KL | test perplexity | tokens |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    groups = defaultdict(list)
    for row in rows:
        groups[row["study"], row["arm"] if row["name"] == "found" else row["name"]].append(row)
    for (study, name), of in groups.items():
        tested = [row for row in of if "test_kl" in row]
        kl = spread([row["test_kl"] for row in tested], ".4f") if tested else ""
        ppl = spread([math.exp(row["test_ce"]) for row in tested], ".2f") if tested else ""
        spent = f"{int(median(row['tokens'] for row in of)):,}"
        search = spread([row["search_kl"] for row in of], ".4f")
        yield f"| {study} | {name} | {len(of)} | {of[0]['sparsity']:.3f} | {search} | {kl} | {ppl} | {spent} |"


def write(rows: list[dict[str, Any]]) -> None:
    """Write the rows and the table."""
    rows.sort(key=lambda row: (list(STUDIES).index(row["study"]), row["arm"], row["seed"], row["name"]))
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    head = "# Gemma 3 270M\n\nWritten by `python gemma.py RUNS`. Median, and range over the seeds.\n\n"
    TABLE.write_text(head + "\n".join([*table(rows), ""]), encoding="utf-8")


def commit(text: str) -> None:
    """Let git take the rows and the table, and nothing else."""
    for command in (["add", ROWS.name, TABLE.name], ["commit", "-qm", text, "--", ROWS.name, TABLE.name]):
        subprocess.run(["git", *command], cwd=HERE, check=True)


def read() -> list[dict[str, Any]]:
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--arms", nargs="+", help="default: all of the study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--text", default="docs")
    parser.add_argument("--commit", action="store_true")
    parser.add_argument("-o", "--override", action="append", default=[])
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    common = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    for study in args.studies:
        for arm, (overrides, seeds) in ARMS[study].items():
            for seed in seeds if args.arms is None or arm in args.arms else ():
                known = {(row["study"], row["arm"], row["seed"]) for row in read()}
                if seed not in args.seeds or (study, arm, seed) in known:
                    continue
                changes = [f"space={STUDIES[study]}", *common, *overrides, f"seed={seed}", *args.override]
                directory = args.runs / f"{study}-{arm}-{seed}"
                levels = args.runs / f"levels-{STUDIES[study].split(',')[0].partition(' ')[2]}-{study}"
                app.search_in_lines(load_settings(HERE / "gemma.yaml", changes), directory, levels=levels)
                write([*read(), *rows_of(study, arm, seed, open_run(directory))])
                if args.commit:
                    commit(f"Gemma 3 270M: {study}, {arm}, seed {seed}")
    print("\n".join(table(read())))


if __name__ == "__main__":
    main()
