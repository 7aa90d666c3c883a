"""Foretold losses of every option from measured effects, for controllers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.search.controllers.knapsack import Array
from secateur.search.controllers.procedure import check_fidelities
from secateur.spaces.measurement import Effects, Fidelity

USUAL_TOKENS = 2048


def curvature_fidelity(fidelities: Sequence[Fidelity], n_tokens: int | None) -> Fidelity:
    """The part ``gradient`` with this number of tokens.

    None: as the smallest fidelity of at least 2,048 tokens, else the largest one.
    """
    if n_tokens is None:
        known = [fidelity.n_tokens for fidelity in check_fidelities(fidelities)]
        n_tokens = next((n for n in known if n >= USUAL_TOKENS), known[-1])
    return Fidelity("gradient", n_tokens)


def predicted(gradients: Sequence[tuple[int, Effects]], damping: float = 1.0) -> list[Array]:
    """Foretold change of the loss by slot and option.

    Args:
        gradients: effects at one candidate, with the tokens of each, its weight in the mean of the first order.
        damping: factor of the second order.
    """
    total = sum(n_tokens for n_tokens, _ in gradients)
    curves = []
    for slot, second in enumerate(gradients[0][1].second):
        first = sum(n_tokens / total * np.array(effects.first[slot]) for n_tokens, effects in gradients)
        curves.append(np.asarray(first + damping * np.array(second), dtype=float))
    return curves


@dataclass(frozen=True)
class Gradient:
    """Effects at one candidate.

    Args:
        candidate: its text.
        positions: of its options.
        n_tokens: that they were computed on.
        effects: first and second order.
    """

    candidate: str
    positions: Sequence[int]
    n_tokens: int
    effects: Effects


def averaged(gradients: Sequence[Gradient], at: Sequence[int], damping: float, decay: float) -> list[Array]:
    """Foretold change of the loss by slot and option from a candidate, from gradients there and at earlier ones.

    Each gradient's quadratic model, seen from the candidate; the mean is weighted by tokens and by recency.
    """
    weights = []
    for gradient in reversed(gradients):
        moved = sum(abs(a - b) for a, b in zip(gradient.positions, at, strict=True))
        weights.append(gradient.n_tokens * float(np.exp(-decay * moved / len(at))))
    curves = []
    own = gradients[-1]
    for slot, here in enumerate(at):
        total = np.zeros(len(own.effects.first[slot]))
        for weight, gradient in zip(weights, reversed(gradients), strict=True):
            model = np.array(gradient.effects.first[slot]) + np.array(gradient.effects.second[slot])
            total += weight / sum(weights) * (model - model[here])
        curves.append(total + (damping - 1) * np.array(own.effects.second[slot]))
    return curves
