"""Landscape with a known optimum, and a controller's search on it for so many tokens."""

from __future__ import annotations

import numpy as np

from secateur.search.controller import Trial
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import ModelShape, Unit

SHAPE = ModelShape(n_params=10**9, bytes_per_param=2, macs_per_token=10**9, kv_bytes_per_token=10)
FIDELITIES = tuple(Fidelity("search", n_tokens) for n_tokens in (512, 2048, 8192))
LEVELS = tuple(i / 10 for i in range(10))
SIZES = (300, 100, 100, 300, 800, 800, 800)


def space_of(n_units: int, targets=(0.6,), sizes=SIZES, levels=LEVELS) -> AllocationSpace:
    units = [Unit(f"u{i}", (100 * sizes[i % len(sizes)],), i // 7, (f"u{i}",)) for i in range(n_units)]
    return AllocationSpace(units, (), levels, targets, SHAPE)


class Landscape:
    """A quadratic bowl with interactions around a known candidate of the target, whose loss is 0, the smallest.

    Noise shrinks with the number of tokens and depends on the candidate alone, as with nested, fixed data.
    """

    def __init__(self, space: AllocationSpace, seed: int) -> None:
        rng = np.random.default_rng(1000 + seed)
        self.space = space
        self.best = space.sample(rng, 0)
        factor = rng.normal(size=(len(space.slots), len(space.slots))) / np.sqrt(len(space.slots))
        self.matrix = np.diag(rng.uniform(0.2, 2, len(space.slots))) + 0.5 * factor @ factor.T

    def exact(self, candidate) -> float:
        apart = np.subtract(candidate.levels, self.best.levels) / 10
        return float(apart @ self.matrix @ apart)

    def measure(self, candidate, fidelity) -> Measurement:
        noise = np.random.default_rng(np.array(candidate.levels)).normal() * 0.2 / np.sqrt(fidelity.n_tokens)
        return Measurement(candidate.text, fidelity, {"loss": self.exact(candidate) + noise})


def spend(controller, measure, n_tokens: int) -> list:
    """Proposals measured for so many tokens, in order."""
    done = []
    while n_tokens > 0 and (proposals := controller.ask(8)):
        for number, proposal in enumerate(proposals):
            controller.tell([Trial(number, measure(proposal.candidate, proposal.fidelity))])
            n_tokens -= proposal.fidelity.n_tokens
        done += proposals
    return done
