"""What it costs to make masked blocks again for each candidate, in CPU time.

    python copies.py LEVELS [--model DIR] [--text docs] [--tokens 512] [--rounds 5]

Offspring of one parent on one thread, by an evaluator whose changed blocks stay until they are changed again and by
one where each is dense again once it was computed. LEVELS is a level store of masks, made if it is not there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from secateur.evaluators import blockwise
from secateur.evaluators.session import set_threads
from secateur.search import app
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity

N_OFFSPRING = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("levels", type=Path)
    parser.add_argument("--model", default="smollm2-135m@wheel")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    set_threads(1)
    data = dict.fromkeys(("calibration", "search", "test"), args.text)
    settings = settings_from(
        {
            "model": args.model,
            "space": {"kind": "allocation", "metric": "wanda", "target": 0.6, "max_sparsity": 0.9},
            "evaluator": {"data": data, "fidelities": [args.tokens], "test_tokens": 512},
            "budget": {"evaluations": 1},
        }
    )
    session = app.open_session(settings)
    session.build_levels(args.levels)
    fidelity = Fidelity("search", args.tokens)
    rng, space = np.random.default_rng(0), session.space
    parent = space.sample(rng, 0)
    texts = [space.mutate(parent, rng).text for _ in range(N_OFFSPRING)]
    ratios = []
    for index in range(args.rounds):
        seconds = []
        for bound in (1 << 40, 0):
            blockwise.MIN_CHANGED_BYTES = blockwise.MAX_CHANGED_BYTES = bound
            evaluator = session.evaluator(args.levels)
            evaluator.evaluate(
                [parent.text], fidelity
            )  # the dense side is computed once, before the clock starts
            started = time.process_time()
            evaluator.evaluate(texts, fidelity)
            seconds.append(time.process_time() - started)
        ratios.append(seconds[1] / seconds[0])
        print(
            f"round {index}: {seconds[0]:.2f} CPU s with blocks that stay, {ratios[-1]:.3f} times that without"
        )
    print(f"median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
