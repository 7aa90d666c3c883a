"""The controller `trust_region`: steps to the exact minimum of a local model of the loss, within a trust region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from secateur.search.controller import Proposal
from secateur.search.controllers.effects import Gradient, averaged, curvature_fidelity
from secateur.search.controllers.procedure import ProcedureController, SearchProcedure, check_fidelities
from secateur.search.controllers.sensitivity import SensitivityProcedure, SensitivitySettings
from secateur.search.controllers.separable import check_separable, solve
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import Space

LARGEST_DAMPING = 256.0
MOST_GRADIENTS = 8
MOST_FAILURES = 4


class TrustRegionSettings(Section):
    """Settings of the controller `trust_region`.

    Args:
        n_tokens: of a gradient, and of the dense model's curvature; None: 2,048, or what is nearest among the
            fidelities.
        radius: options that a slot may move in one step.
        damping: factor of the second-order term at the beginning, >= 1; steps that disappoint double it.
    """

    kind: Literal["trust_region"] = "trust_region"
    n_tokens: int | None = Field(default=None, gt=0)
    radius: int = Field(default=2, ge=1)
    damping: float = Field(default=1.0, ge=1)
    attempts: int = 2
    decay: float = 0.5
    grow: float = 4.0
    more: float = 1.0


class TrustRegion(ProcedureController):
    """Steps for each target from the curvature's solution, by the gradient at the present candidate.

    The local model is first order in the change of weights by the gradient of the loss at the candidate, and second
    order by the dense model's curvature, see `spaces.measurement.Effects`. A step is the exact minimum of the model
    under the budget among the candidates whose slots move by at most `radius` options. It is measured at the largest
    fidelity on windows that no gradient saw, accepted if the loss is lower, and the damping of the second-order term
    follows the ratio of the true to the foretold gain, as in textbook trust-region methods. A refused step costs a
    measurement, and a further gradient on other windows, which is averaged with those before.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,  # unused
        settings: TrustRegionSettings,
        objective: str = "loss",
    ) -> None:
        super().__init__(objective)
        self._space = check_separable(space, "trust_region")
        self._largest = check_fidelities(fidelities)[-1]
        self._settings = settings
        self._gradient = curvature_fidelity(fidelities, settings.n_tokens)
        start = SensitivitySettings(by="curvature", n_tokens=settings.n_tokens)
        self._start = SensitivityProcedure(self._space, fidelities, start, self.effects)
        self._open(self._begin_targets())

    @property
    def n_measurements(self) -> int:
        return self._start.n_measurements + len(self._space.targets)

    def _begin_targets(self) -> SearchProcedure:
        yield from self._start.run()
        starts = self._start.solutions.items()
        losses = yield [Proposal(candidate, self._largest) for _, found in starts for candidate in found]
        remaining = iter(losses)
        for target, found in starts:
            loss, candidate = min(((next(remaining), c) for c in found), key=lambda pair: pair[0])
            if math.isfinite(loss):
                self._open(self._descend(target, candidate, loss))

    def _descend(self, target: int, candidate: Any, loss: float) -> SearchProcedure:
        """Steps from a candidate until no step helps."""
        lam = self._settings.damping
        most = math.inf
        gradients: list[Gradient] = []
        n_tokens = self._gradient.n_tokens
        n_failed = 0
        while n_failed < MOST_FAILURES:
            n_here = sum(g.n_tokens for g in gradients if g.candidate == candidate.text)
            proposal = Proposal(candidate, Fidelity("gradient", n_here + n_tokens))
            (found,) = yield [proposal]
            if not math.isfinite(found):
                return
            gradients.append(
                Gradient(
                    candidate.text,
                    self._positions(candidate),
                    proposal.fidelity.n_tokens,
                    self.effects[proposal.key],
                )
            )
            gradients = gradients[-MOST_GRADIENTS:]
            for _ in range(self._settings.attempts):
                step, gain = self._step(target, candidate, gradients, self._settings.radius, lam, most)
                moved = sum(abs(a - b) for a, b in zip(self._positions(step), self._positions(candidate)))
                self.debug = f"most {most} gain {gain:.4f} moved {moved}"
                if step.text == candidate.text:
                    most = max(4, 2 * most)
                    break
                (new,) = yield [Proposal(step, self._largest)]
                ratio = (loss - new) / gain if gain > 0 else 0.0
                if ratio < 0.25:
                    most = max(moved / self._settings.grow, 4)
                elif ratio > 0.5:
                    most = 2 * moved
                if new < loss:
                    candidate, loss, n_failed = step, new, 0
                    n_tokens = min(round(n_tokens * self._settings.more), 8192)
                    break
            else:
                n_failed += 1
                n_tokens = int(n_tokens * 2)

    def _positions(self, candidate: Any) -> list[int]:
        chosen = enumerate(self._space.disassemble(candidate))
        return [list(self._space.options(slot)).index(option) for slot, option in chosen]

    def _step(
        self,
        target: int,
        candidate: Any,
        gradients: Sequence[Gradient],
        radius: int,
        damping: float,
        most: float,
    ) -> tuple[Any, float]:
        """The best candidate in the trust region, and its foretold gain."""
        at = self._positions(candidate)
        curves = averaged(gradients, at, damping, self._settings.decay)
        far = [np.abs(np.arange(len(curve)) - here) for curve, here in zip(curves, at, strict=True)]

        def solved(price):
            bounded = [
                np.where(d > radius, np.inf, curve + price * d) for curve, d in zip(curves, far, strict=True)
            ]
            return solve(self._space, bounded, target)

        def moved(c):
            return sum(abs(a - b) for a, b in zip(self._positions(c), at))

        found = solved(0.0)
        if found is None:
            return candidate, 0.0
        if moved(found) > most:
            low, high = 0.0, max(float(np.abs(c[np.isfinite(c)]).max()) for c in curves)
            for _ in range(12):
                middle = (low + high) / 2 if low == 0 and _ < 1 else math.sqrt(max(low, high / 1e3) * high)
                c = solved(middle)
                if moved(c) > most:
                    low = middle
                else:
                    high, found = middle, c
            if moved(found) > most:
                found = candidate
        gain = -sum(curve[there] for curve, there in zip(curves, self._positions(found), strict=True))
        return found, float(gain)
