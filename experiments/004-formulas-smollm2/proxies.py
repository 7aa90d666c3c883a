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
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from secateur.evaluators.session import Session, set_threads
from secateur.pruners.calibration.fisher import Moments, walk_back
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


def timed(losses: Callable[[list[Any]], list[float]], texts: list[Any]) -> tuple[np.ndarray, float]:
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
        session.build_levels(args.levels / kind)
    n_blocks = len(session.anatomy.blocks)
    pruner = session.cases["main"].pruner()
    pruner.open(args.levels / "full")
    texts = distinct(session, pruner.layers, args.formulas)
    evaluator, fidelity = session.evaluator(args.levels / "full"), Fidelity("search", args.tokens)
    evaluator.evaluate(["dense"], fidelity)  # the dense side of the loss

    def measured(some: list[str]) -> list[float]:
        return [m.values.get("loss", np.inf) for text in some for m in evaluator.evaluate([text], fidelity)]

    truth, seconds = timed(measured, texts)
    print(
        json.dumps({"formulas": len(texts), "tokens": args.tokens, "measured_cpu_s": round(seconds, 3)}),
        flush=True,
    )
    for kind in ("diagonal", "full"):
        pruner.open(args.levels / kind)
        for n, rows in ((8, 32), (8, 8), (4, 32), (n_blocks, 32), (n_blocks, ALL_ROWS)):
            places = np.linspace(0, n_blocks - 1, min(n, n_blocks)).round().astype(int).tolist()
            proxy = FormulaProxy(pruner.layers, Grams(tuple(places), kind), rows)

            def foretold(some: list[str], proxy: FormulaProxy = proxy) -> list[float]:
                configs = (session.space.config(session.space.parse(text)) for text in some)
                return [_loss(proxy, config) for config in configs]

            foretold(texts[:1])  # draws the rows
            losses, cpu = timed(foretold, texts)
            size = {"gram": kind, "blocks": len(places), "rows": "all" if rows == ALL_ROWS else rows}
            show(size | {"cpu_s": round(cpu, 4)}, losses, truth)
    configs = [session.space.config(session.space.parse(text)) for text in texts]
    show_curvature(session, pruner.layers, configs, truth, args.tokens)


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "of losses": lambda table: table.sum(1),
    "of roots": lambda table: np.sqrt(table).sum(1),
    "of log(1 + 10 x)": lambda table: np.log1p(10 * table).sum(1),
    "of losses relative to Wanda's": lambda table: (table / table[0]).sum(1),
}
"""Foretold losses of formulas, by formula and projection, to one number a formula; the first formula is Wanda."""


def show(about: dict[str, object], losses: np.ndarray, truth: np.ndarray) -> None:
    """Print rank correlations of foretold losses with the true ones."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    better = np.argsort(truth)[: len(truth) // 2]
    rho = [spearmanr(losses[chosen], truth[chosen]).statistic for chosen in (slice(None), better)]
    print(json.dumps(about | {"rho": round(rho[0], 3), "rho_better_half": round(rho[1], 3)}), flush=True)


def show_curvature(
    session: Session,
    layers: FormulaLayers,
    configs: list[dict[str, object]],
    truth: np.ndarray,
    n_tokens: int,
) -> None:
    """Print rank correlations of losses foretold by the curvature, of all rows of all blocks."""
    proxy = FormulaProxy(layers, Grams(tuple(range(len(session.anatomy.blocks))), "full"), ALL_ROWS)
    moments = output_moments(session, n_tokens)
    n_blocks = len(session.anatomy.blocks)
    for rows in (32, 128, ALL_ROWS):
        sampled = FormulaProxy(layers, Grams(tuple(range(n_blocks)), "full"), rows, moments)
        losses, cpu = timed(lambda some, of=sampled: [_loss(of, config) for config in some], configs)
        size = {"curvature": "whole", "rows": "all" if rows == ALL_ROWS else rows, "cpu_s": round(cpu, 4)}
        show(size, losses, truth)
    for outputs in ("whole", "diagonal"):
        table = np.array([by_curvature(layers, proxy, config, moments, outputs) for config in configs])
        for name, losses in TRANSFORMS.items():
            show({"curvature": outputs, "sum": name}, losses(table), truth)


def output_moments(session: Session, n_tokens: int) -> dict[str, torch.Tensor]:
    """Second moment of the gradients of each projection's outputs, for drawn labels, on calibration windows."""
    tokens = session.training_windows()
    tokens = tokens[: max(1, n_tokens // tokens.shape[1])]
    moments, drawn = Moments(), torch.Generator().manual_seed(0)
    names = [linear.name for linear in session.anatomy.linears]
    for _ in walk_back(session.anatomy, tokens, moments.add_gradients, watched=names, drawn=drawn):
        pass
    return {name: moment / tokens.numel() for name, moment in moments.gradients.items()}


def by_curvature(
    layers: FormulaLayers,
    proxy: FormulaProxy,
    config: dict[str, object],
    moments: dict[str, torch.Tensor],
    outputs: str,
) -> list[float]:
    """``tr(B D A D^T) / 2`` of each projection, D the pruned weights; B whole or its diagonal."""
    formula, found = formula_of(config["metric"]), []
    for sample in proxy.samples:
        try:
            kept = layers.mask(formula, sample.terminals, config["sparsity"][sample.name], sample.name)
        except FormulaError:
            return [float("inf")] * len(proxy.samples)
        gone, b = sample.weight.masked_fill(kept[sample.rows], 0), moments[sample.name]
        seen = (b @ gone if outputs == "whole" else b.diagonal()[:, None] * gone) @ sample.gram
        found.append(float((seen * gone).sum()) / 2)
    return found


def _loss(proxy: FormulaProxy, config: dict[str, object]) -> float:
    try:
        return proxy.loss(config)
    except FormulaError:
        return float("inf")


if __name__ == "__main__":
    main()
