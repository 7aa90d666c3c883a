"""Curvature as a metric of weights and as an importance of units, beside other methods, on text that none has seen.

    python kfac.py SCRATCH [--model tiny --text docs] [--weights 0.5 0.6 0.7] [--structure 0.25] [--methods NAME ...]

32 windows of 128 calibration tokens; KL to the dense model in nats a token and perplexity, on 8,192 tokens of the
last part of the text.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from secateur.search.app.session import open_session
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.form import completed

WEIGHTS = {
    "wanda": {"metric": "wanda"},
    "obs (formula)": {"metric": "formula: square(W) / H"},
    "kfac": {"metric": "kfac"},
    "kfac, one threshold": {"metric": "kfac", "allocation": "global"},
    "kfac, obs": {"metric": "kfac", "repair": "obs"},
    "kfac, one threshold, obs": {"metric": "kfac", "allocation": "global", "repair": "obs"},
    "sparsegpt": {"metric": "sparsegpt"},
    "admm_gradual": {"metric": "admm_gradual"},
    "llm_surgeon, shares alike": {"metric": "llm_surgeon"},
    "llm_surgeon": {"metric": "llm_surgeon", "allocation": "global"},
}
STRUCTURE = {
    f"{metric}, {rule}": {"metric": metric, "allocation": rule, "repair": "obs"}
    for metric in ("flap", "obs", "kfac", "kfac_obs")
    for rule in ("uniform", "global")
    if rule == "uniform" or metric in ("flap", "kfac")  # places in an order have no threshold
}


def measured(args: argparse.Namespace, unit: str, sparsity: float, forms: dict[str, dict]) -> None:
    """Print a table."""
    settings = settings_from(
        {
            "model": args.model,
            "space": {"kind": "recipe", "unit": unit, "target": sparsity, "known": []},
            "evaluator": {
                "loss": "kl",
                "window": 512,
                "fidelities": [2048],
                "test_tokens": 8192,
                "calibration_tokens": 4096,
                "data": dict.fromkeys(("calibration", "search", "test"), args.text),
            },
        }
    )
    session, levels = open_session(settings), args.scratch / f"{Path(args.model).name}-{unit}-{sparsity}"
    session.build_levels(levels, lambda index: None)
    evaluator, test = session.evaluator(levels), Fidelity("test", 8192)
    print(f"\n{sparsity:.0%} of the {unit}\n\n| method | KL | perplexity | seconds |\n|---|---:|---:|---:|")
    for name, form in forms.items():
        started = time.perf_counter()
        recipe = completed({"unit": unit, "sparsity": sparsity, **form})
        (found,) = evaluator.evaluate([Recipe.of(recipe).text], test)
        seconds = time.perf_counter() - started
        if found.infeasible:
            print(f"| {name} | {found.infeasible} | | |", flush=True)
            continue
        ppl = math.exp(found.values["ce"])
        print(f"| {name} | {found.values['kl']:.4f} | {ppl:.1f} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--weights", type=float, nargs="*", default=[0.5, 0.6, 0.7])
    parser.add_argument("--structure", type=float, nargs="*", default=[0.25])
    parser.add_argument("--methods", nargs="+", help="of those in the tables; default: all")
    args = parser.parse_args()
    for unit, sparsities, forms in (
        ("weights", args.weights, WEIGHTS),
        ("structure", args.structure, STRUCTURE),
    ):
        some = {name: form for name, form in forms.items() if not args.methods or name in args.methods}
        for sparsity in sparsities:
            if some:
                measured(args, unit, sparsity, some)


if __name__ == "__main__":
    main()
