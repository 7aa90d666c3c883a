"""Losses of a search on `tiny`: what they cost, how they rank candidates, and what a search by each of them finds.

python objectives.py WORK [--seeds 5] [--tokens 30720]
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokens import cpu_seconds, settings, spend

from secateur.evaluators.session import Session
from secateur.search import app
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.controllers.proxy_screening import spearman
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity

LOSSES = ("kl", "ce", "weighted_kl", "acceptance")
N_RANDOM = 24


def opened(loss: str, work: Path, measures: list[str]) -> Session:
    raw: dict[str, Any] = settings("tiny", "docs", objectives=["loss"])
    raw["space"] |= {"step": 0.05, "max_sparsity": 0.9}
    raw["evaluator"] |= {
        "window": 128,
        "fidelities": [256, 1024],
        "calibration_tokens": 4096,
        "test_tokens": 2048,
    }
    raw["evaluator"] |= {"loss": loss, "measures": measures}
    session = app.open_session(settings_from(raw))
    session.build_levels(work / "levels")
    session.open_damaged(work, work / "levels")
    return session


def costs(work: Path, n_rounds: int = 5) -> None:
    plain, full = opened("kl", work, []), opened("kl", work, ["weighted_kl", "acceptance"])
    fidelity, ratios = plain.plan.fidelities[1], []
    rng = np.random.default_rng(0)
    for _ in range(n_rounds):
        texts = [plain.space.sample(rng, 0).text for _ in range(8)]
        pair = []
        for session in (plain, full):
            evaluator = session.evaluator(work / "levels")
            evaluator.evaluate([plain.space.baselines()["uniform@0.6"].text], fidelity)  # and the dense side
            pair.append(cpu_seconds(partial(evaluator.evaluate, texts, fidelity)))
        ratios.append(pair[1] / pair[0])
    print(f"all measures / KL and CE alone, CPU time: {statistics.median(ratios):.3f}, {sorted(ratios)}")


def ranks(work: Path) -> None:
    session = opened("kl", work, ["weighted_kl", "acceptance"])
    evaluator, rng = session.evaluator(work / "levels"), np.random.default_rng(1)
    texts = [session.space.sample(rng, 0).text for _ in range(N_RANDOM)]
    reference = session.space.baselines()["uniform@0.6"].text
    small, large, test = session.plan.fidelities
    at = {f.text: evaluator.evaluate([reference, *texts], f) for f in (small, large, test)}
    for f, measured in at.items():
        shares = [0.2 * m.values["weighted_kl"] / m.values["kl"] for m in measured]
        print(f"{f}: share of the KL at the damaged fifth: reference {shares[0]:.2f}, others "
              f"{statistics.median(shares[1:]):.2f} ({min(shares[1:]):.2f} to {max(shares[1:]):.2f})")  # fmt: skip

    def column(fidelity: Fidelity, loss: str) -> list[float]:
        values = [m.values[loss] for m in at[fidelity.text][1:]]
        return [-x for x in values] if loss == "acceptance" else values

    for loss in LOSSES:
        row = {of: spearman(column(small, loss), column(test, of)) for of in LOSSES}
        texts_of_row = ", ".join(f"{name} {value:.2f}" for name, value in row.items())
        print(f"rank correlation, {loss} on {small.text} with test: {texts_of_row}")


def searches(work: Path, n_seeds: int, n_tokens: int) -> None:
    measures = ["weighted_kl", "acceptance"]
    for loss in LOSSES:
        session, found = opened(loss, work, measures), []
        evaluator, fidelities = session.evaluator(work / "levels"), session.plan.fidelities
        for seed in range(n_seeds):
            controller = Evolution(session.space, fidelities[:-1], seed, EvolutionSettings(offspring=8))
            _, best = spend(controller, evaluator, n_tokens)
            found.append(evaluator.evaluate([best], fidelities[-1])[0].values)
        columns = {of: sorted(values[of] for values in found) for of in LOSSES}
        texts = [f"{of} {statistics.median(x):.4f} ({x[0]:.4f} to {x[-1]:.4f})" for of, x in columns.items()]
        print(f"searched by {loss}, on test: {', '.join(texts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=30720)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    ranks(args.work)
    costs(args.work)
    searches(args.work, args.seeds, args.tokens)


if __name__ == "__main__":
    main()
