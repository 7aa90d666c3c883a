"""Levels by method and statistics: models of the uniform allocation and of a found one, on test text.

    python levels.py RESULTS --text FILE [--methods admm_gradual sparsegpt admm] [--dampening 0.1]

RESULTS gets a line of JSON for each model as it is measured; models that are there are not measured again. The setting
is that of 001: the same model, texts, levels and calibration windows. The found allocation is the best one of 001's
`both-2`, which was searched on SparseGPT levels from dense statistics, so that all methods have the same.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.session import Session
from secateur.pruners.stores.block_files import is_built
from secateur.pruners.weights.level_store import LevelStore, StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.search import app
from secateur.search.settings.settings import load_settings

HERE = Path(__file__).parent
BEFORE = HERE.parent / "001-allocation-smollm2"
METHODS = ("admm_gradual", "sparsegpt", "admm")
STATISTICS = ("expected", "sequential", "dense")

Case = tuple[str, str, str]
"""Method, allocation, statistics."""


class Experiment:
    """The dense model with both allocations; the results, kept as they come.

    Args:
        session: of 001's settings.
        results: file of the lines.
        dampening: of the methods.
    """

    def __init__(self, session: Session, results: Path, dampening: float) -> None:
        self._session, self._results, self._dampening = session, results, dampening
        self._data: EvaluationData = session.data()
        self._data.of(session.plan.final_fidelities[-1])  # the dense side, while the model is dense
        uniform = session.space.baselines()["uniform@0.6"].text
        self.allocations: dict[str, Mapping[str, float]] = {
            name: session.config(candidate)["sparsity"]
            for name, candidate in {"uniform": uniform, "found": found_allocation()}.items()
        }
        self._dense = {linear: linear.weight for linear in session.anatomy.linears}

    def run(self, method: str, statistics: str) -> None:
        """Measure the models of a method and statistics that are not in the results."""
        names = [x for x in self.allocations if (method, x, statistics) not in self.rows]
        if statistics == "sequential":  # of the uniform allocation they are the expected ones
            names = [name for name in names if name != "uniform"]
            for name in names:
                of = self._method(method)
                tokens = self._session.pruner.calibration.tokens
                prune(self._session.anatomy, self.allocations[name], of, tokens, sequential=True)
                self._measure((method, name, statistics))
        elif names:
            store = self._levels(method, statistics)
            for name in names:
                for linear in self._session.anatomy.linears:
                    sparsity = self.allocations[name][linear.name]
                    linear.point_to(store.weight(linear, self._choices[linear.name].index(sparsity)))
                self._measure((method, name, statistics))
            shutil.rmtree(self._directory(method, statistics))

    @property
    def rows(self) -> dict[Case, dict[str, Any]]:
        """Results so far."""
        lines = self._results.read_text(encoding="utf-8").splitlines() if self._results.exists() else []
        return {tuple(row.pop("case")): row for row in map(json.loads, lines)}

    @property
    def _choices(self) -> dict[str, tuple[float, ...]]:
        """Levels of each linear: dense, and those of the allocations."""
        names = self.allocations["uniform"]
        return {x: tuple(sorted({0.0, *(y[x] for y in self.allocations.values())})) for x in names}

    def _levels(self, method: str, statistics: str) -> LevelStore:
        session, directory = self._session, self._directory(method, statistics)
        key = StoreKey(
            session.dense.fingerprint,
            session.dense.dtype,
            session.pruner.calibration.sha256,
            self._method(method),
            self._choices,
            self.allocations["uniform"] if statistics == "expected" else None,
        )
        if not is_built(directory, key):
            build_levels(directory, session.anatomy, session.pruner.calibration.tokens, key)
        return LevelStore(directory, session.anatomy, self._choices)

    def _method(self, name: str) -> Method:
        return Method(name, dampening=self._dampening)

    def _directory(self, method: str, statistics: str) -> Path:
        return self._results.with_name(f"{self._results.stem}-{method}-{statistics}")

    def _measure(self, case: Case) -> None:
        """Add the live model's test loss to the results, and make it dense again."""
        losses = self._data.live_losses(self._session.plan.final_fidelities[-1])
        for linear, weight in self._dense.items():
            linear.point_to(weight)
        row = {"case": case, "kl": losses["kl"], "ppl": math.exp(losses["ce"])}
        with self._results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def found_allocation() -> str:
    """The best candidate of 001's `both-2`."""
    lines = (BEFORE / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["run"] == "both-2"]
    best: str = min(rows, key=lambda row: row["search_kl"])["candidate"]
    return best


def table(rows: Mapping[Case, Mapping[str, Any]]) -> str:
    """A line a method and allocation, a pair of columns for each statistics."""
    columns = STATISTICS[::-1]
    heads = " | ".join(f"{name}: KL | perplexity" for name in columns)
    lines = [f"| method | allocation | {heads} |", "|---|---|" + "---:|---:|" * len(columns)]
    for method, allocation in product(dict.fromkeys(case[0] for case in rows), ("uniform", "found")):
        cells = []
        for statistics in columns:
            same = "expected" if (allocation, statistics) == ("uniform", "sequential") else statistics
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
    changes = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    changes += [f"model={args.model}"] if args.model else []
    session = app.open_session(load_settings(BEFORE / "config.yaml", changes))
    experiment = Experiment(session, args.results, args.dampening)
    for method, statistics in product(args.methods, STATISTICS):
        experiment.run(method, statistics)
    print(table(experiment.rows))


if __name__ == "__main__":
    main()
