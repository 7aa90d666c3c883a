"""Profile of a real model's levels: a loss of candidates that costs nothing to evaluate, for simulations.

    python landscape.py SCRATCH [--out profile.json]

Measures the linears of `tiny` alone (Wanda, 2,048 tokens), and 1,132 candidates at 60 %: random ones, walks of
mutations from the uniform one, and minimisers of perturbed sums. What SCRATCH/measured.jsonl holds is not measured
again.

The model is that of errors that are correlated. With c the loss of a slot alone, the loss of a candidate is that of

    s = sum of c + sum over pairs of slots of r sqrt(c c'),    a s / (1 + s / b):

one r for each pair of roles in a block, one for all pairs of blocks, one more for neighbouring blocks. It is fitted to
70 % of the candidates and compared with the others, beside the sum of c alone.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from secateur.search.app.session import open_session
from secateur.search.controllers.separable import complete, solve
from secateur.search.settings.settings import settings_from

ROLES = 7  # of the slots of a block
PAIRS = tuple(combinations(range(ROLES), 2))
N_CORRELATIONS = len(PAIRS) + 2
ALONE = (4, 8, 10, 12, 14, 16, 19)  # levels measured alone
LEAST = 0.15  # smallest eigenvalue of a block's correlations


class Measured:
    """Losses of candidates, each measured once."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.file = scratch / "measured.jsonl"
        settings = settings_from(
            {"model": "tiny", "space": {"target": 0.6}, "evaluator": {"fidelities": [2048]}}
        )
        self.session = open_session(settings)
        self.session.build_levels(scratch / "levels", lambda index: None)
        self.evaluator = self.session.evaluator(scratch / "levels")
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.known = dict(json.loads(line) for line in lines)

    def losses(self, candidates) -> np.ndarray:
        space, [fidelity, *_] = self.session.space, self.session.plan.fidelities
        missing = [c for c in dict.fromkeys(candidates) if c.text not in self.known]
        missing.sort(key=space.locality_key)
        for start in range(0, len(missing), 16):
            texts = [candidate.text for candidate in missing[start : start + 16]]
            with self.file.open("a", encoding="utf-8") as file:
                for m in self.evaluator.evaluate(texts, fidelity):
                    self.known[m.candidate] = m.values["loss"]
                    file.write(json.dumps([m.candidate, m.values["loss"]]) + "\n")
        return np.array([self.known[candidate.text] for candidate in candidates])


def alone(measured: Measured) -> np.ndarray:
    """Loss of each slot and level in the dense model."""
    space = measured.session.space
    n, shares = len(space.slots), np.array(space.levels)
    singles = [
        [space.assemble([level * (s == slot) for s in range(n)]) for level in ALONE] for slot in range(n)
    ]
    losses = measured.losses([candidate for row in singles for candidate in row]).reshape(n, len(ALONE))
    return np.array([complete(shares, dict(zip(ALONE, row.tolist(), strict=True)), 0) for row in losses])


def together(space, curves: np.ndarray) -> dict[str, list]:
    """Candidates of several kinds."""
    rng = np.random.default_rng(0)
    kinds = {"random": [space.sample(rng, 0) for _ in range(332)], "walk": []}
    for _ in range(20):
        candidate = space.baselines()["uniform@0.6"]
        for _ in range(20):
            candidate = space.mutate(candidate, rng)
            kinds["walk"].append(candidate)
    rng, kinds["near"] = np.random.default_rng(5), []
    shares = np.array(space.levels)
    for _ in range(400):
        width = rng.uniform(0.1, 1.0)
        scale = np.exp(width * rng.normal(size=(len(curves), 1)))
        slope = np.exp(0.3 * width * rng.normal(size=(len(curves), 1)) * (shares - 0.6))
        kinds["near"].append(solve(space, list(np.maximum.accumulate(curves * scale * slope, axis=1)), 0))
    return kinds


def terms(of_slots: np.ndarray) -> np.ndarray:
    """Sum of losses alone, then what each correlation multiplies; ``(candidates, 1 + N_CORRELATIONS)``."""
    roots = np.sqrt(of_slots).reshape(len(of_slots), -1, ROLES)
    pairs = [(roots[:, :, a] * roots[:, :, b]).sum(axis=1) for a, b in PAIRS]
    blocks = roots.sum(axis=2)
    far = (blocks.sum(axis=1) ** 2 - (blocks**2).sum(axis=1)) / 2
    near = (blocks[:, 1:] * blocks[:, :-1]).sum(axis=1)
    return np.column_stack([of_slots.sum(axis=1), *pairs, far, near])


def loss(sums: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    *correlations, factor, end = parameters
    total = np.maximum(sums @ np.array([1.0, *correlations]), 1e-3)
    return factor * total / (1 + total / np.exp(end))


def fit(sums: np.ndarray, losses: np.ndarray) -> np.ndarray:
    def residuals(parameters: np.ndarray) -> np.ndarray:
        error = np.log(loss(sums, parameters)) - np.log(losses)
        return np.concatenate([error / np.where(losses < 0.6, 0.05, 0.3), 3 * parameters[:N_CORRELATIONS]])

    start = np.array([0.0] * N_CORRELATIONS + [1.0, 3.0])
    return least_squares(residuals, start).x


class Profile:
    """Loss of candidates of a space with the slots of the profile, another one for each seed.

    The losses alone and the correlations are perturbed (by log-normal factors, and for each block apart). Correlations
    stay those of errors: without it a search finds candidates whose errors cancel. Measurements have a relative noise
    of their candidate and fidelity, 2 % at 2,048 tokens.
    """

    def __init__(self, path: Path, seed: int, width: float = 0.3) -> None:
        profile, rng = json.loads(path.read_text(encoding="utf-8")), np.random.default_rng((8, seed))
        curves = np.array(profile["alone"])
        self._curves = curves * np.exp(width * rng.normal(size=(len(curves), 1)))
        parameters = np.array(profile["parameters"])
        self._far, self._near, self._factor, self._end = parameters[-4:].tolist()
        self._blocks = []
        for _ in range(len(curves) // ROLES):
            matrix = np.eye(ROLES)
            for (a, b), r in zip(
                PAIRS, parameters[: len(PAIRS)] + width * rng.normal(size=len(PAIRS)), strict=True
            ):
                matrix[a, b] = matrix[b, a] = r / 2
            values, vectors = np.linalg.eigh(matrix)
            matrix = vectors * np.maximum(values, LEAST) @ vectors.T
            scale = np.sqrt(np.diag(matrix))
            self._blocks.append(matrix / scale / scale[:, None])
        self._correlations, self._seed = np.array(self._blocks), seed

    def exact(self, candidate) -> float:
        of_slots = self._curves[np.arange(len(self._curves)), list(candidate.levels)]
        roots = np.sqrt(np.maximum(of_slots, 0)).reshape(-1, ROLES)
        within = np.einsum("bi,bij,bj->", roots, self._correlations, roots)
        blocks = roots.sum(axis=1)
        across = (
            self._far * (blocks.sum() ** 2 - (blocks**2).sum()) / 2
            + self._near * (blocks[1:] * blocks[:-1]).sum()
        )
        total = within + across
        return float(self._factor * total / (1 + total / np.exp(self._end)))

    def measured(self, candidate, n_tokens: int) -> float:
        noise = np.random.default_rng((self._seed, n_tokens, *candidate.levels)).normal()
        return self.exact(candidate) * float(np.exp(0.02 * noise * np.sqrt(2048 / n_tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "profile.json")
    args = parser.parse_args()
    measured = Measured(args.scratch)
    curves = np.maximum(alone(measured), 0)
    kinds = together(measured.session.space, curves)
    candidates = [(kind, candidate) for kind, some in kinds.items() for candidate in some]
    losses = measured.losses([candidate for _, candidate in candidates])
    levels = np.array([candidate.levels for _, candidate in candidates])
    sums = terms(curves[np.arange(len(curves)), levels])
    held_out = np.random.default_rng(0).random(len(losses)) < 0.3
    parameters = fit(sums[~held_out], losses[~held_out])
    print(
        "| candidates held out | number | rank correlation, the sum | the profile | its error, RMS of the log |"
    )
    print("|---|---:|---:|---:|---:|")
    for kind in kinds:
        some = held_out & np.array([k == kind for k, _ in candidates])
        foretold, true = loss(sums[some], parameters), losses[some]
        ranks = [spearmanr(x, true)[0] for x in (sums[some, 0], foretold)]
        error = np.sqrt(np.mean(np.log(foretold / true) ** 2))
        print(f"| {kind} | {some.sum()} | {ranks[0]:.2f} | {ranks[1]:.2f} | {error:.3f} |")
    profile = {"alone": np.round(curves, 6).tolist(), "parameters": np.round(parameters, 4).tolist()}
    args.out.write_text(json.dumps(profile) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
