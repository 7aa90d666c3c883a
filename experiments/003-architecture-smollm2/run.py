"""Runs the arms of the comparison; a run that is there is continued, so a stopped experiment goes on.

    python run.py RUNS --text FILE [--arms ...] [--seeds 0 1 2] [--model DIR] [--tokens N]

All arms share one level store. The baselines of every run are the dense model, the uniform one, FLAP's allocation and
ShortGPT's blocks. `front` is one search for targets from 5 to 40 % of the blocks' parameters, with latencies predicted
from a table that `secateur latency MODEL --threads 1 --clock cpu` has measured before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from secateur.search import app
from secateur.search.settings.settings import load_settings

HERE = Path(__file__).parent
EVOLUTION = ["controller.kind=evolution", "controller.offspring=8", "controller.survivors=[2]"]
LEVELS = "[0.25, 0.5, 1.0]"  # each sub-layer is measured alone at these shares; the others are interpolated
TRAINED = "evaluator.training={tokens: [512, 2048], learn: full, loss: kl, learning_rate: 3.0e-5}"
ARMS = {
    "uniform": ["controller.kind=uniform"],
    "sleb": ["controller.kind=greedy", "controller.moves=block"],
    "blockpruner": ["controller.kind=greedy", "controller.moves=sublayer"],
    "sensitivity": ["controller.kind=sensitivity", f"controller.levels={LEVELS}"],
    "evolution": EVOLUTION,
    "both": [*EVOLUTION, "controller.start=sensitivity", f"controller.sensitivity.levels={LEVELS}"],
    "trained": [*EVOLUTION, TRAINED],
    "curvature": ["controller.kind=sensitivity", "controller.by=curvature"],
    "trust_region": ["controller.kind=trust_region"],
    "front": [
        *EVOLUTION,
        "space.target={low: 0.05, high: 0.4, step: 0.05}",
        "controller.start=sensitivity",
        f"controller.sensitivity.levels={LEVELS}",
        "objectives=[loss, params, latency_prefill, latency_decode]",
        "evaluator.latency={threads: 1, clock: cpu}",
    ],
}
SEEDED = {"evolution", "both", "trained"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    common = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    common += [f"model={args.model}"] if args.model else []
    common += [f"budget.tokens={args.tokens}"] if args.tokens else []
    for arm in args.arms:
        for seed in args.seeds if arm in SEEDED else [0]:
            name = f"{arm}-{seed}"
            settings = load_settings(HERE / "config.yaml", [*common, *ARMS[arm], f"seed={seed}"])
            levels = args.runs / ("levels-front" if arm == "front" else "levels")
            app.search_in_lines(settings, args.runs / name, levels=levels)


if __name__ == "__main__":
    main()
