"""How well closed forms foretell the order of formulas, and what they cost.

    python proxies.py LEVELS --text FILE [--model DIR] [--formulas 36] [--tokens 2048] [--threads 1]

The set is fixed: the published formulas, and random ones that prune the probe layers differently. For each proxy CPU
seconds a formula and Spearman's rank correlation with the true loss, over all formulas and over the better half.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from secateur.evaluators.session import Session, set_threads
from secateur.pruners.formulas.evaluate import FormulaError
from secateur.pruners.weights.formula_layers import FormulaLayers
from secateur.pruners.weights.formula_proxy import FormulaProxy
from secateur.pruners.weights.formula_store import Grams
from secateur.search.app.session import plan
from secateur.search.settings.settings import load_settings
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.measurement import Fidelity

HERE = Path(__file__).parent
ALL_ROWS = 1 << 30


def distinct(session: Session, layers: FormulaLayers, n: int) -> list[str]:
    """The published formulas, then random ones, each with a fingerprint of its own."""
    rng, found = np.random.default_rng(0), dict[str, str]()
    known = [c for name, c in session.space.baselines().items() if name != "dense"]
    while len(found) < n:
        candidate = known.pop(0) if known else session.space.sample(rng, 0)
        program = formula_of(session.space.config(candidate)["metric"])
        try:
            found.setdefault(layers.fingerprint(program, session.plan.space.target), candidate.text)
        except FormulaError:
            continue
    return list(found.values())


def timed(losses: Callable[[list[str]], list[float]], texts: list[str]) -> tuple[np.ndarray, float]:
    """The losses, and CPU seconds a formula."""
    start = time.process_time()
    found = losses(texts)
    return np.array(found), (time.process_time() - start) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("levels", type=Path, help="directory of the statistics; made if it is missing")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--formulas", type=int, default=36)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--override", action="append", default=[])
    args = parser.parse_args()
    changes = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    changes += [f"model={args.model}"] if args.model else []
    changes += args.override
    changes += [f"evaluator.fidelities=[{args.tokens}]", "space.also=[]", "space.proxy.blocks=1000"]
    set_threads(args.threads)
    settings = load_settings(HERE / "config.yaml", changes)
    for kind in ("diagonal", "full"):
        space = settings.space.model_copy(
            update={"proxy": settings.space.proxy.model_copy(update={"gram": kind})}
        )
        session = Session(replace(plan(settings), space=space), print)
        session.build_levels(args.levels)
    n_blocks = len(session.anatomy.blocks)
    pruner = session.cases["main"].pruner()
    pruner.open(args.levels)
    texts = distinct(session, pruner.layers, args.formulas)
    evaluator, fidelity = session.evaluator(args.levels), Fidelity("search", args.tokens)
    evaluator.evaluate(["dense"], fidelity)  # the dense side of the loss

    def measured(some: list[str]) -> list[float]:
        return [m.values.get("loss", np.inf) for text in some for m in evaluator.evaluate([text], fidelity)]

    truth, seconds = timed(measured, texts)
    better = np.argsort(truth)[: len(texts) // 2]
    print(
        json.dumps({"formulas": len(texts), "tokens": args.tokens, "measured_cpu_s": round(seconds, 3)}),
        flush=True,
    )
    layers = pruner.layers
    for kind in ("full", "diagonal"):
        for n, rows in ((8, 32), (8, 8), (4, 32), (n_blocks, 32), (n_blocks, ALL_ROWS)):
            places = np.linspace(0, n_blocks - 1, min(n, n_blocks)).round().astype(int).tolist()
            proxy = FormulaProxy(layers, Grams(tuple(places), kind), rows)

            def foretold(some: list[str], proxy: FormulaProxy = proxy) -> list[float]:
                configs = (session.space.config(session.space.parse(text)) for text in some)
                return [_loss(proxy, config) for config in configs]

            foretold(texts[:1])  # draws the rows
            losses, cpu = timed(foretold, texts)
            rho = [spearmanr(losses[chosen], truth[chosen]).statistic for chosen in (slice(None), better)]
            size = {"gram": kind, "blocks": len(places), "rows": "all" if rows == ALL_ROWS else rows}
            line = {
                **size,
                "cpu_s": round(cpu, 4),
                "rho": round(rho[0], 3),
                "rho_better_half": round(rho[1], 3),
            }
            print(json.dumps(line), flush=True)


def _loss(proxy: FormulaProxy, config: dict[str, object]) -> float:
    try:
        return proxy.loss(config)
    except FormulaError:
        return float("inf")


if __name__ == "__main__":
    main()
