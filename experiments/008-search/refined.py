"""Searches on levels from dense, expected and refined statistics, at equal tokens, and the models that they export.

    python refined.py RUNS [--model tiny] [--text docs] [--metrics admm_gradual ...] [--seeds 0 1 2] [--tokens 61440]

One run for each metric, kind of levels and seed; a run that is there is continued. Each model is measured on test text
as it was searched, and pruned once more sequentially; the exports' default is the first for expected levels, and the
second for dense ones.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from pathlib import Path

from exported import COLUMNS, exported

from secateur.search import app
from secateur.search.settings.settings import load_settings

HERE = Path(__file__).parent
LEVELS = {
    "dense": ["space.statistics=dense"],
    "expected": ["space.statistics=expected"],
    "expected, then refined": ["space.statistics=expected", "space.refine=1"],
}


def measure(run: Path, common: list[str], metric: str, kind: str, seed: int, tokens: int) -> list[float]:
    """Values of the columns of `exported` after so many tokens, both stages together."""
    stages = 2 if "refine" in kind else 1
    changes = [f"space.metric={metric}", *LEVELS[kind], f"seed={seed}", f"budget.tokens={tokens // stages}"]
    settings = load_settings(HERE / "refined.yaml", [*common, *changes])
    app.search_in_lines(settings, run)
    return exported(run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--metrics", nargs="+", default=["admm_gradual", "sparsegpt"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=61440)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    common = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    common += [f"model={args.model}"]
    lines = [f"| metric | levels | {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * len(COLUMNS)]
    for metric, kind in product(args.metrics, LEVELS):
        rows = []
        for seed in args.seeds:
            run = args.runs / f"{metric}-{kind.replace(', ', '-').replace(' ', '-')}-{seed}"
            rows.append(measure(run, common, metric, kind, seed, args.tokens))
        columns = zip(*rows, strict=True)
        cells = [f"{statistics.median(x):.4g} ({min(x):.4g} to {max(x):.4g})" for x in columns]
        lines.append(f"| {metric} | {kind} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
