"""Local model of the loss around a candidate, from measured effects of single switches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.search.controllers.knapsack import Array
from secateur.search.controllers.procedure import check_fidelities
from secateur.search.controllers.separable import solve
from secateur.spaces.measurement import Effects, Fidelity
from secateur.spaces.space import SeparableSpace

USUAL_TOKENS = 2048
MOST_GRADIENTS = 8
FORGETTING = 3.0
"""Rate at which a gradient's weight falls with the options moved since, a slot: to e^-3 after one in each."""

DAMPING = 2.0
"""Factor of the second order away from the dense model, whose curvature is too small there: where single switches of
found allocations were measured, 1.5 to 2 foretold them best."""

BISECTIONS = 12


def curvature_fidelity(fidelities: Sequence[Fidelity], n_tokens: int | None) -> Fidelity:
    """The part ``gradient`` with this number of tokens.

    None: as the smallest fidelity of at least 2,048 tokens, else the largest one.
    """
    if n_tokens is None:
        known = [fidelity.n_tokens for fidelity in check_fidelities(fidelities)]
        n_tokens = next((n for n in known if n >= USUAL_TOKENS), known[-1])
    return Fidelity("gradient", n_tokens)


def quadratic(effects: Effects, damping: float = 1.0) -> list[Array]:
    """Foretold change of the loss by slot and option: the first order, and the second times a factor."""
    pairs = zip(effects.first, effects.second, strict=True)
    return [np.add(first, np.multiply(damping, second)) for first, second in pairs]


@dataclass(frozen=True)
class Step:
    """Candidate near another one.

    Args:
        candidate: the better one, or the other one itself if there is none.
        gain: foretold decrease of the loss, in nats a token.
        n_moved: options by which its slots moved, in all.
    """

    candidate: Any
    gain: float
    n_moved: int


class LocalModel:
    """Sum over slots of quadratic models in the change of weights, at a candidate and those measured before it.

    A gradient on few tokens is noise in good part: the models of the last gradients are averaged, each as seen from the
    present candidate, weighted by their tokens and by how near they are.

    Args:
        space: of the candidates.
    """

    def __init__(self, space: SeparableSpace[Any]) -> None:
        self._space = space
        self._gradients: list[tuple[tuple[int, ...], int, list[Array]]] = []

    def add(self, candidate: Any, n_tokens: int, effects: Effects) -> None:
        """Add a candidate's effects, with the number of tokens that they were measured on."""
        self._gradients.append((self.positions(candidate), n_tokens, quadratic(effects, DAMPING)))
        del self._gradients[:-MOST_GRADIENTS]

    @property
    def known(self) -> bool:
        """True once there is a gradient."""
        return bool(self._gradients)

    def n_tokens(self, candidate: Any) -> int:
        """Tokens of the gradients at this very candidate."""
        at = self.positions(candidate)
        return sum(n_tokens for positions, n_tokens, _ in self._gradients if positions == at)

    def positions(self, candidate: Any) -> tuple[int, ...]:
        """Positions of a candidate's options among those of their slots."""
        chosen = enumerate(self._space.disassemble(candidate))
        return tuple(list(self._space.options(slot)).index(option) for slot, option in chosen)

    def foretold(self, candidate: Any, parent: Any) -> float:
        """Foretold loss of a candidate over that of another one, in nats a token."""
        at, there = self.positions(parent), self.positions(candidate)
        return sum(float(curve[index]) for curve, index in zip(self._curves(at), there, strict=True))

    def step(self, target: int, candidate: Any, radius: int, most: float) -> Step:
        """The exact minimum of the model under the target, within the trust region.

        Args:
            target: index of the target.
            candidate: present one.
            radius: options by which a slot may move.
            most: options by which all slots may move in all. Beyond it a price an option is added to the model: the
                smallest that keeps to it.
        """
        at = self.positions(candidate)
        curves = self._curves(at)
        apart = [np.abs(np.arange(len(curve)) - own) for curve, own in zip(curves, at, strict=True)]

        def solved(price: float) -> Step:
            pairs = zip(curves, apart, strict=True)
            losses = [np.where(far > radius, np.inf, curve + price * far) for curve, far in pairs]
            found = solve(self._space, losses, target)
            there = at if found is None else self.positions(found)
            gain = -sum(float(curve[index]) for curve, index in zip(curves, there, strict=True))
            moved = sum(abs(a - b) for a, b in zip(there, at, strict=True))
            return Step(candidate if found is None else found, gain, moved)

        step = solved(0.0)
        if step.n_moved <= most:
            return step
        step = Step(candidate, 0.0, 0)
        high = max(float(np.abs(curve).max()) for curve in curves)
        low = high / 1e6
        for _ in range(BISECTIONS):
            price = math.sqrt(low * high)
            tried = solved(price)
            if tried.n_moved > most:
                low = price
            else:
                high, step = price, tried
        return step

    def _curves(self, at: Sequence[int]) -> list[Array]:
        """Foretold change of the loss by slot and option."""
        weights = []
        for positions, n_tokens, _ in self._gradients:
            moved = sum(abs(a - b) for a, b in zip(positions, at, strict=True))
            weights.append(n_tokens * math.exp(-FORGETTING * moved / len(at)))
        curves = []
        for slot, own in enumerate(at):
            models = [curves[slot] - curves[slot][own] for _, _, curves in self._gradients]
            curves.append(np.average(models, axis=0, weights=weights))
        return curves
