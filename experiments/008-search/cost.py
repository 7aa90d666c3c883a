"""CPU time of a gradient against that of a loss on as many tokens, nothing shared between candidates.

    python cost.py LEVELS --text FILE [--rounds 3] [--tokens 2048]

Both are measured in each round on candidates of their own; the ratio is that of a round. A gradient's windows are new
in each round, so that the dense model's pass over them is part of it. LEVELS is built if it is missing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from secateur.search.app.session import open_session
from secateur.search.settings.settings import load_settings
from secateur.search.show.values import spread
from secateur.spaces.measurement import Fidelity

CONFIG = Path(__file__).parents[1] / "001-allocation-smollm2" / "config.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("levels", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    changes = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    changes += [f"model={args.model}"] if args.model else []
    settings = load_settings(CONFIG, [*changes, "controller.kind=trust_region"])
    session = open_session(settings)
    session.build_levels(args.levels)
    evaluator, space, rng = session.evaluator(args.levels), session.space, np.random.default_rng(0)
    fidelities = Fidelity("search", args.tokens), Fidelity("gradient", args.tokens)
    evaluator.evaluate([space.baselines()["dense"].text], fidelities[0])  # the dense side of the loss, once
    ratios = []
    for _ in range(args.rounds):
        seconds = []
        for fidelity in fidelities:
            candidate = space.sample(rng, 0)
            began = time.process_time()
            evaluator.evaluate([candidate.text], fidelity)
            seconds.append(time.process_time() - began)
        ratios.append(seconds[1] / seconds[0])
        print(f"gradient {ratios[-1]:.2f} times a loss on {args.tokens:,} tokens", flush=True)
    print(f"median and range of {args.rounds} rounds: {spread(ratios)}")


if __name__ == "__main__":
    main()
