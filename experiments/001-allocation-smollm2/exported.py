"""The best candidate of a run, and the uniform one, pruned once more sequentially: exported, reloaded, measured.

python exported.py RUN OUT
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from secateur.search import app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    run = app.open_run(args.run)
    pruned = [t for t in run.trials() if t.measurement.values["sparsity"] > 0.5]
    best = min(pruned, key=lambda t: t.measurement.values["loss"])
    for name, trial in {"best": best, "uniform": run.baselines["uniform@0.6"]}.items():
        summary = app.export(args.run, trial, args.out / name, say=lambda line: print(line, flush=True))
        for what, values in summary.measured.items():
            row = {
                "model": name,
                "trial": trial.number,
                "on": what,
                "kl": values["kl"],
                "ppl": math.exp(values["ce"]),
            }
            print(json.dumps(row), flush=True)
        print(json.dumps({"model": name, "checks": dict(summary.checks)}), flush=True)


if __name__ == "__main__":
    main()
