"""Levels by method and statistics: the exported model of the uniform allocation and of a found one, on test text.

    python levels.py RESULTS --text FILE [--methods sparsegpt admm admm_gradual] [--dampening 0.1]

RESULTS gets a line of JSON for each model as it is measured; models that are there are not measured again. The setting
is that of 001: the same model, texts, levels and calibration windows. The found allocation is the best one of 001's
`both-2`, which was searched on SparseGPT levels from dense statistics, so that all methods have the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.session import Session
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.search import app
from secateur.search.settings.settings import load_settings

HERE = Path(__file__).parent
BEFORE = HERE.parent / "001-allocation-smollm2"
METHODS = ("sparsegpt", "admm", "admm_gradual")
STATISTICS = ("dense", "sequential", "expected")
ALLOCATIONS = ("uniform", "found")

Case = tuple[str, str, str]
"""Method, allocation, statistics."""


def cases(methods: list[str]) -> list[Case]:
    """Without expected statistics of the uniform allocation, which are the sequential ones."""
    wanted = product(methods, ALLOCATIONS, STATISTICS)
    return [case for case in wanted if case[1:] != ("uniform", "expected")]


def found_allocation() -> str:
    """The best candidate of 001's `both-2`."""
    lines = (BEFORE / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["run"] == "both-2"]
    best: str = min(rows, key=lambda row: row["search_kl"])["candidate"]
    return best


def measure(session: Session, data: EvaluationData, case: Case, dampening: float) -> dict[str, Any]:
    """Test loss of the model pruned for good; the session's model is dense again afterwards."""
    name, allocation, statistics = case
    baselines = session.space.baselines()
    uniform = session.space.config(baselines["uniform@0.6"])["sparsity"]
    candidate = {"uniform": baselines["uniform@0.6"].text, "found": found_allocation()}[allocation]
    dense = {linear: linear.weight for linear in session.anatomy.linears}
    started = time.monotonic()
    try:
        prune(
            session.anatomy,
            session.config(candidate)["sparsity"],
            Method(name, dampening=dampening),
            session.pruner.calibration.tokens,
            sequential=statistics == "sequential",
            expected=uniform if statistics == "expected" else None,
        )
        seconds = time.monotonic() - started
        losses = data.live_losses(session.plan.final_fidelities[-1])
    finally:
        for linear, weight in dense.items():
            linear.point_to(weight)
    return {"kl": losses["kl"], "ppl": math.exp(losses["ce"]), "seconds": seconds}


def table(rows: Mapping[Case, Mapping[str, Any]]) -> str:
    """A line a method and allocation, a pair of columns for each statistics."""
    heads = " | ".join(f"{name}: KL | perplexity" for name in STATISTICS)
    lines = [f"| method | allocation | {heads} |", "|---|---|" + "---:|---:|" * len(STATISTICS)]
    for method, allocation in product(dict.fromkeys(case[0] for case in rows), ALLOCATIONS):
        cells = []
        for statistics in STATISTICS:
            same = "sequential" if (allocation, statistics) == ("uniform", "expected") else statistics
            row = rows.get((method, allocation, same))
            cells += ["–", "–"] if row is None else [f"{row['kl']:.3f}", f"{row['ppl']:.1f}"]
        lines.append(f"| {method} | {allocation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--dampening", type=float, default=0.01)
    args = parser.parse_args()
    known = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    rows = {tuple(row.pop("case")): row for row in map(json.loads, known)}
    changes = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    changes += [f"model={args.model}"] if args.model else []
    missing = [case for case in cases(args.methods) if case not in rows]
    if missing:
        session = app.open_session(load_settings(BEFORE / "config.yaml", changes))
        data = session.data()
        data.of(session.plan.final_fidelities[-1])  # the dense side, while the model is dense
        for case in missing:
            rows[case] = measure(session, data, case, args.dampening)
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"case": case, **rows[case]}) + "\n")
            print(*case, rows[case], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
