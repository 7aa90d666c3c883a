"""Cost of an evaluated token for offspring of one parent, and losses that generations behind a random depth find.

    python tokens.py cost LEVELS [--text FILE] [--model NAME] [--rounds 3]
    python tokens.py search LEVELS [--seeds 8] [--tokens 61440]
    python tokens.py landscape [--seeds 8] [--evaluations 800]

`cost` measures CPU time against a bare forward pass of the same model on the same tokens, head and KL in both, rounds
interleaved; LEVELS is a level store, made if it is not there. `search` runs evolution on `tiny` at equal nominal
tokens, and prints the KL of the best candidate on the search text and on the test text. `landscape` asks the same of
made-up losses, in a minute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div

from secateur.evaluators import blockwise
from secateur.evaluators.evaluator import Evaluator
from secateur.search import app
from secateur.search.controller import Trial
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.settings.settings import settings_from
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import ModelShape, Unit

N_OFFSPRING, N_TOKENS = 8, 512
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8)
"""Shares of the model before which nothing is varied."""


def settings(model: str, text: str, **changes: Any) -> dict[str, Any]:
    raw = {
        "model": model,
        "space": {"metric": "sparsegpt", "target": 0.6, "step": 0.2, "max_sparsity": 0.8},
        "evaluator": {
            "data": dict.fromkeys(("calibration", "search", "test"), text),
            "fidelities": [512, 2048],
            "calibration_tokens": 2048,
            "test_tokens": 8192,
        },
        "executor": {"threads": 1},
        "objectives": ["loss", "sparsity"],
    }
    return {**raw, **changes}


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def cost(levels: Path, text: str, model: str, n_rounds: int) -> None:
    session = app.open_session(settings_from(settings(model, text)))
    session.build_levels(levels)
    live, tokens = session.loaded.model, session.windows["search"][: N_TOKENS // 512]
    with torch.no_grad():
        dense = live(input_ids=tokens).logits.log_softmax(-1)

    @torch.no_grad()
    def bare() -> float:
        logits = live(input_ids=tokens, use_cache=False).logits
        return float(kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="sum"))

    space, rng, fidelity = session.space, np.random.default_rng(0), Fidelity("search", N_TOKENS)
    parent = space.baselines()["uniform@0.6"]
    blockwise.MIN_PREFIX_BYTES, kept = 0, blockwise.MIN_PREFIX_BYTES
    blockwise.MAX_PREFIX_BYTES, most = 0, blockwise.MAX_PREFIX_BYTES
    forgetful = session.evaluator(levels)
    blockwise.MIN_PREFIX_BYTES, blockwise.MAX_PREFIX_BYTES = kept, most
    usual = session.evaluator(levels)
    n_blocks = len(session.anatomy.blocks)
    arms = [("nothing kept", forgetful, 0.0), *((f"behind {depth:.0%}", usual, depth) for depth in DEPTHS)]
    for _, evaluator, depth in arms[:2]:  # the dense side is computed once, before the clock starts
        evaluator.evaluate([space.mutate_after(parent, depth, rng).text for _ in range(2)], fidelity)
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in arms}
    for _ in range(n_rounds):
        base = cpu_seconds(bare)
        for name, evaluator, depth in arms:
            texts = [space.mutate_after(parent, depth, rng).text for _ in range(N_OFFSPRING)]
            found: list[Any] = []

            def work(evaluator: Any = evaluator, texts: Any = texts, found: Any = found) -> None:
                found.extend(evaluator.evaluate(texts, fidelity))

            seconds = cpu_seconds(work) / N_OFFSPRING
            computed = sum(m.blocks for m in found) / (N_OFFSPRING * n_blocks)
            ratios[name].append((seconds / base, computed))
            print(f"{name}: {seconds / base:.3f} of a bare forward, {computed:.0%} of the blocks", flush=True)
    for name, rows in ratios.items():
        costs = sorted(ratio for ratio, _ in rows)
        computed = statistics.mean(share for _, share in rows)
        print(
            f"{name}: median {statistics.median(costs):.3f} ({costs[0]:.3f} to {costs[-1]:.3f}), {computed:.0%}"
        )


ARMS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "usual": ({}, [256, 1024]),
    "late 0.5": ({"late": 0.5}, [256, 1024]),
    "late 1": ({"late": 1.0}, [256, 1024]),
    "no racing": ({}, [1024]),
    "racing in three": ({}, [256, 512, 1024]),
}


def search(levels: Path, n_seeds: int, n_tokens: int) -> None:
    raw = settings("tiny", "docs")
    raw["space"] |= {"step": 0.05, "max_sparsity": 0.9}
    raw["evaluator"] |= {"window": 128, "fidelities": [256, 512, 1024], "calibration_tokens": 4096}
    session = app.open_session(settings_from(raw))
    session.build_levels(levels)
    evaluator, test = session.evaluator(levels), session.plan.fidelities[-1]
    losses: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    for seed in range(n_seeds):
        for name, (changes, fidelities) in ARMS.items():
            of = EvolutionSettings(offspring=N_OFFSPRING, **changes)
            controller = Evolution(session.space, [Fidelity("search", n) for n in fidelities], seed, of)
            loss, best = spend(controller, evaluator, n_tokens)
            (tested,) = evaluator.evaluate([best], test)
            losses[name].append((loss, tested.values["kl"]))
        print(seed, {name: found[-1] for name, found in losses.items()}, flush=True)
    for name, found in losses.items():
        wins = sum(test < usual for (_, test), (_, usual) in zip(found, losses["usual"], strict=True))
        print(
            f"{name}: search KL {of_seeds(0, found)}, test KL {of_seeds(1, found)}, below usual in {wins} of {n_seeds}"
        )


def of_seeds(column: int, found: list[tuple[float, float]]) -> str:
    values = sorted(pair[column] for pair in found)
    return f"{statistics.median(values):.4f} ({values[0]:.4f} to {values[-1]:.4f})"


def spend(controller: Evolution, evaluator: Evaluator, n_tokens: int) -> tuple[float, str]:
    """Loss and text of the best candidate at the largest fidelity after so many nominal tokens."""
    found: dict[str, dict[str, float]] = {}
    largest = 0
    while n_tokens > 0 and (proposals := controller.ask(N_OFFSPRING)):
        for fidelity in dict.fromkeys(proposal.fidelity for proposal in proposals):
            texts = [x.candidate.text for x in proposals if x.fidelity == fidelity]
            measured = evaluator.evaluate(texts, fidelity)
            controller.tell([Trial(number, measurement) for number, measurement in enumerate(measured)])
            n_tokens -= fidelity.n_tokens * len(texts)
            if fidelity.n_tokens >= largest:
                largest = fidelity.n_tokens
                found.setdefault(fidelity.text, {}).update({m.candidate: m.values["loss"] for m in measured})
    at_largest = found[Fidelity("search", largest).text]
    best = min(at_largest, key=at_largest.__getitem__)
    return at_largest[best], best


class Landscape(Evaluator):
    """A quadratic bowl with interactions around a hidden allocation, relative to the uniform one's loss."""

    def __init__(self, space: AllocationSpace, seed: int) -> None:
        rng, n = np.random.default_rng(1000 + seed), len(space.slots)
        factor = rng.normal(size=(n, n)) / np.sqrt(n)
        self._space, self._best = space, space.sample(rng, 0)
        self._matrix = np.diag(rng.uniform(0.2, 2, n)) + 0.5 * factor @ factor.T
        self._uniform = self._bowl(space.baselines()["uniform@0.6"])

    def _bowl(self, candidate: Any) -> float:
        apart = np.subtract(candidate.levels, self._best.levels)
        return float(apart @ self._matrix @ apart)

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        losses = [self._bowl(self._space.parse(text)) / self._uniform for text in candidates]
        return [Measurement(x, fidelity, {"loss": y}) for x, y in zip(candidates, losses, strict=True)]


def landscape(n_seeds: int, n_evaluations: int) -> None:
    """Loss found without a model: 6 blocks of 7 linears, exact losses, one fidelity."""
    sizes = (300, 100, 100, 300, 800, 800, 800)
    units = [Unit(f"u{i}", (100 * sizes[i % 7],), i // 7, (f"u{i}",)) for i in range(42)]
    levels, shape = tuple(i / 20 for i in range(19)), ModelShape(10**9, 2, 10**9, 10)
    space, found = AllocationSpace(units, (), levels, (0.6,), shape), dict[float, list[float]]()
    for seed in range(n_seeds):
        for late in (0.0, 0.25, 0.5, 1.0):
            of = EvolutionSettings(offspring=N_OFFSPRING, late=late)
            controller = Evolution(space, [Fidelity("search", 1)], seed, of)
            found.setdefault(late, []).append(spend(controller, Landscape(space, seed), n_evaluations)[0])
    for late, losses in found.items():
        ratios = np.log(losses) - np.log(found[0.0])
        error = ratios.std(ddof=1) / np.sqrt(n_seeds)
        print(
            f"late {late}: median {statistics.median(losses):.3f} of uniform's, "
            f"log ratio to usual {ratios.mean():+.3f} +- {error:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("cost", "search", "landscape"))
    parser.add_argument("directory", type=Path, nargs="?", default=Path("levels"))
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", default="smollm2-135m@wheel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=61440)
    parser.add_argument("--evaluations", type=int, default=800)
    args = parser.parse_args()
    if args.what == "cost":
        cost(args.directory, args.text, args.model, args.rounds)
    elif args.what == "landscape":
        landscape(args.seeds, args.evaluations)
    else:
        search(args.directory, args.seeds, args.tokens)


if __name__ == "__main__":
    main()
