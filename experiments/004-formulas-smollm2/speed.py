"""What a formula costs before anything is measured: scoring and masking all layers, its fingerprint, its proxy.

python speed.py LEVELS --text FILE [--model DIR] [--threads 1 2] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from secateur.evaluators.session import Session
from secateur.pruners.weights.formula_layers import FormulaLayers
from secateur.search.app.session import plan
from secateur.search.settings.settings import load_settings
from secateur.spaces.formulas.metric import formula_of

HERE = Path(__file__).parent


def mask_all(layers: FormulaLayers, config: dict[str, object]) -> None:
    """Score and mask every projection of the model."""
    program = formula_of(str(config["metric"]))
    for block in layers.anatomy.blocks:
        layers.masks(block.index, program, config["sparsity"])  # type: ignore[arg-type]  # as the space gives it


def spent(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds, on the wall and of the processors."""
    work()  # maps files, draws rows
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return {"wall_s": round(statistics.median(walls), 4), "cpu_s": round(statistics.median(processors), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("levels", type=Path, help="directory of the statistics; made if it is missing")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--override", action="append", default=[])
    args = parser.parse_args()
    changes = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    changes += [f"model={args.model}"] if args.model else []
    changes += args.override
    session = Session(plan(load_settings(HERE / "config.yaml", changes)), print)
    session.build_levels(args.levels)
    pruner = session.cases["main"].pruner()
    pruner.open(args.levels)
    layers, proxy = pruner.layers, pruner.proxy
    for name, formula in session.space.known.items():
        config = session.space.config(formula)
        program, target = formula_of(config["metric"]), session.plan.space.target
        work = {
            "scores and masks of all layers": lambda config=config: mask_all(layers, config),
            "fingerprint": lambda program=program, target=target: layers.fingerprint(program, target),
            "proxy": lambda program=program, config=config: proxy.error(program, config["sparsity"]),
        }
        for what, (threads, run) in ((w, (t, r)) for w, r in work.items() for t in args.threads):
            torch.set_num_threads(threads)
            line = {"formula": name, "what": what, "threads": threads, **spent(run, args.repeats)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
