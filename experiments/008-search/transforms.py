"""Transforms of the losses that the curvature foretells: what the exact solution of each loses.

    python transforms.py LEVELS [--model tiny --text docs] [--metric sparsegpt] [--targets 0.5 0.6 0.7 0.8]

The curvature foretells the loss x of each slot's options from the dense model, in nats a token; the solution minimises
the sum of f(x) under the target. KL on 8,192 tokens of the search part and of the last part.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from secateur.search.app.session import open_session
from secateur.search.controllers.local_model import curvature_fidelity
from secateur.search.controllers.separable import solve
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity

TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x": lambda x: x,
    "log(1 + x)": np.log1p,
    "log(1 + 10 x)": lambda x: np.log1p(10 * x),
    "log(1 + 100 x)": lambda x: np.log1p(100 * x),
    "x / (1 + 10 x)": lambda x: x / (1 + 10 * x),
    "x^0.75": lambda x: x**0.75,
    "x^0.5": np.sqrt,
    "x^1.25": lambda x: x**1.25,
    "x^1.5": lambda x: x**1.5,
    "x^2": np.square,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("levels", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--metric", default="sparsegpt")
    parser.add_argument("--transforms", nargs="+", default=list(TRANSFORMS), choices=TRANSFORMS)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    args = parser.parse_args()
    settings = settings_from(
        {
            "model": args.model,
            "space": {"metric": args.metric, "target": args.targets, "max_sparsity": 0.95},
            "controller": {"kind": "trust_region"},
            "evaluator": {
                "fidelities": [2048, 8192],
                "test_tokens": 8192,
                "data": dict.fromkeys(("calibration", "search", "test"), args.text),
            },
        }
    )
    session = open_session(settings)
    session.build_levels(args.levels, lambda index: None)
    evaluator, space = session.evaluator(args.levels), session.space
    fidelity = curvature_fidelity(session.plan.fidelities[:-1], None)
    (dense,) = evaluator.evaluate([space.baselines()["dense"].text], fidelity)
    assert dense.effects is not None, "of the part gradient"
    foretold = [np.array(row) for row in dense.effects.second]
    fidelities = Fidelity("search", 8192), Fidelity("test", 8192)
    print(
        "| sparsity | transform | foretold | search KL | test KL | test perplexity |\n|---:|---|---:|---:|---:|---:|"
    )
    for index, target in enumerate(space.targets):
        uniform = list(space.baselines().values())[1 + index]
        candidates = {"uniform": uniform}
        for name in args.transforms:
            candidates[name] = solve(space, [TRANSFORMS[name](row) for row in foretold], index)
        for name, candidate in candidates.items():
            at = enumerate(space.disassemble(candidate))
            whole = sum(foretold[slot][list(space.options(slot)).index(option)] for slot, option in at)
            search, test = (evaluator.evaluate([candidate.text], of)[0].values for of in fidelities)
            cells = f"{whole:.3f} | {search['kl']:.3f} | {test['kl']:.3f} | {math.exp(test['ce']):.1f}"
            print(f"| {target:g} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
