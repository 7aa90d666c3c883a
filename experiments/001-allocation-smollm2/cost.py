"""What an evaluated token costs, against a bare forward pass of the same model with the same loss, in CPU time.

    python cost.py LEVELS --text FILE [--model DIR] [--rounds 7] [--tokens 2048] [--set KEY=VALUE ...]

LEVELS is the level store of run.py. Rounds are interleaved; the ratios are of one round each. `--set` changes settings,
for another model or level maker.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div

from secateur.evaluators import blockwise
from secateur.search import app
from secateur.search.settings.settings import load_settings
from secateur.spaces.measurement import Fidelity

HERE = Path(__file__).parent


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("levels", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--set", nargs="+", default=[], dest="changes")
    args = parser.parse_args()
    common = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    common += [f"model={args.model}"] if args.model else []
    session = app.open_session(load_settings(HERE / "config.yaml", [*common, *args.changes]))
    session.build_levels(args.levels)
    fidelity = Fidelity("search", args.tokens)
    model, tokens = session.loaded.model, session.windows["search"][: args.tokens // session.plan.window]
    with torch.no_grad():
        dense = model(input_ids=tokens).logits.log_softmax(-1)

    @torch.no_grad()
    def bare_kl() -> float:
        logits = model(input_ids=tokens, use_cache=False).logits
        return float(kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="sum"))

    @torch.no_grad()
    def bare_ce() -> float:
        logits = model(input_ids=tokens, use_cache=False).logits
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    rng = np.random.default_rng(0)
    space = session.space
    parent = space.baselines()["uniform@0.6"]

    def offspring(n: int) -> list[str]:
        return [space.mutate(parent, rng).text for _ in range(n)]

    blockwise.MAX_PREFIX_BYTES = 0
    unshared = session.evaluator(args.levels)
    blockwise.MAX_PREFIX_BYTES = 1 << 30
    shared = session.evaluator(args.levels)
    for evaluator in (unshared, shared):  # the dense side is computed once, before the clock starts
        evaluator.evaluate([parent.text], fidelity)
    rows = []
    for _ in range(args.rounds):
        row = {
            "bare, KL": cpu_seconds(bare_kl),
            "bare, CE": cpu_seconds(bare_ce),
            "evaluator, alone": cpu_seconds(lambda: unshared.evaluate(offspring(1), fidelity)),
            "evaluator, 8 offspring": cpu_seconds(lambda: shared.evaluate(offspring(8), fidelity)) / 8,
        }
        rows.append(row)
        print(
            {name: round(seconds / args.tokens * 1e3, 3) for name, seconds in row.items()},
            "CPU ms a token",
            flush=True,
        )
    for name in ("evaluator, alone", "evaluator, 8 offspring"):
        for bare in ("bare, KL", "bare, CE"):
            ratios = sorted(row[name] / row[bare] for row in rows)
            print(
                f"{name} / {bare}: median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}"
            )


if __name__ == "__main__":
    main()
