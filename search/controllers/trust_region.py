"""The controller `trust_region`: steps to the exact minimum of a local model of the loss, within a trust region."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from secateur.search.controller import Proposal
from secateur.search.controllers.local_model import LocalModel, curvature_fidelity
from secateur.search.controllers.procedure import (
    Key,
    ProcedureController,
    SearchProcedure,
    check_fidelities,
    side_by_side,
)
from secateur.search.controllers.sensitivity import SensitivityProcedure, SensitivitySettings
from secateur.search.controllers.separable import check_separable
from secateur.spaces.measurement import Effects, Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import SeparableSpace, Space

ATTEMPTS = 3
"""Steps tried by one gradient, each within a smaller region."""

FAILURES = 4
"""Gradients in a row without a better candidate, after which a minimum is reached."""

ENOUGH = 0.05
"""Relative gain of a step below which the next one is found and measured at the next fidelity."""

SHRINKAGE, FEWEST = 3, 4
GOOD, POOR = 0.5, 0.25


class TrustRegionSettings(Section):
    """Settings of the controller `trust_region`.

    Args:
        n_tokens: of the dense model's curvature; None: 2,048, or what is nearest among the fidelities.
        radius: options that a slot may move in one step.
    """

    kind: Literal["trust_region"] = "trust_region"
    n_tokens: int | None = Field(default=None, gt=0)
    radius: int = Field(default=2, ge=1)


class TrustRegionProcedure:
    """Descent of each target within a trust region; `trust_region` runs it alone, `evolution` may start with it.

    The local model is first order in the change of weights by the gradient of the loss at the candidate, and second
    order by the dense model's curvature, see `LocalModel` and `spaces.measurement.Effects`. It begins at the solution
    of the curvature, or at the uniform candidate where that is better: far from the dense model the second order may
    be too coarse. A step is the exact minimum of the model under the target among the candidates whose slots move by
    at most `radius` options each, and by a bounded number in all. It is measured on windows that no gradient saw, and
    accepted if the loss is lower. The bound follows the ratio of the true to the foretold gain, as in textbook
    trust-region methods (Conn, Gould and Toint, 2000). The first step is found and measured on as many tokens as the
    smallest fidelity of at least 2,048 has. After a gradient without a better candidate, or with one that is better by
    less than a twentieth, steps go on at the next fidelity, since smaller gains need less noise. Each gradient is of
    windows of its own, which no loss is measured on. A gradient costs three times its tokens.

    Args:
        effects: those measured so far, by their proposals, see `ProcedureController`.

    Raises:
        ValueError: if the fidelities are out of order.
    """

    def __init__(
        self,
        space: SeparableSpace[Any],
        fidelities: Sequence[Fidelity],
        settings: TrustRegionSettings,
        effects: Mapping[Key, Effects],
    ) -> None:
        self._space = space
        self._radius = settings.radius
        self._effects = effects
        least = curvature_fidelity(fidelities, None).n_tokens
        self._fidelities = [f for f in check_fidelities(fidelities) if f.n_tokens >= least]
        start = SensitivitySettings(by="curvature", n_tokens=settings.n_tokens)
        self._start = SensitivityProcedure(space, fidelities, start, effects)
        self.solutions: dict[int, list[Any]] = {}  # target -> the best candidate so far
        self.losses: dict[str, float] = {}
        """Losses of starts and solutions at the largest fidelity, by the candidate's text, if measured."""

    @property
    def n_measurements(self) -> int:
        """Number of measurements before the first steps."""
        return self._start.n_measurements + len(self._space.targets)

    def run(self) -> SearchProcedure:
        """Descend from the curvature's solution or the uniform candidate, the better one of each target.

        All targets side by side; fills `solutions`.
        """
        yield from self._start.run()
        starts = [(target, c) for target, found in self._start.solutions.items() for c in found]
        uniform = list(self._space.baselines().values())[1 : 1 + len(self._space.targets)]
        starts += enumerate(uniform)
        losses = yield [Proposal(candidate, self._fidelities[0]) for _, candidate in starts]
        if len(self._fidelities) == 1:
            found = zip(starts, losses, strict=True)
            self.losses |= {c.text: loss for (_, c), loss in found if math.isfinite(loss)}
        best: dict[int, tuple[float, Any]] = {}
        for (target, candidate), loss in zip(starts, losses, strict=True):
            if math.isfinite(loss) and (target not in best or loss < best[target][0]):
                best[target] = loss, candidate
        yield from side_by_side([self._descend(target, *reversed(found)) for target, found in best.items()])

    def _descend(self, target: int, candidate: Any, loss: float) -> SearchProcedure:
        """Steps from a candidate until no step helps."""
        self.solutions[target] = [candidate]
        model, most = LocalModel(self._space), math.inf
        further, n_failed = list(self._fidelities), 0
        fidelity, refused = further.pop(0), set[str]()
        while n_failed < FAILURES and math.isfinite(loss):
            gradient = Proposal(
                candidate, Fidelity("gradient", model.n_tokens(candidate) + fidelity.n_tokens)
            )
            (found,) = yield [gradient]
            if not math.isfinite(found):
                return
            model.add(candidate, gradient.fidelity.n_tokens, self._effects[gradient.key])
            n_failed, before = n_failed + 1, loss
            for _ in range(ATTEMPTS):
                step = model.step(target, candidate, self._radius, most)
                if not step.n_moved:
                    most = max(FEWEST, SHRINKAGE * most)
                    break
                if step.candidate.text in refused:
                    most = step.n_moved / SHRINKAGE
                    continue
                (new,) = yield [Proposal(step.candidate, fidelity)]
                ratio = (loss - new) / step.gain if step.gain > 0 else 0.0
                if ratio < POOR:
                    most = max(FEWEST, step.n_moved / SHRINKAGE)
                elif ratio > GOOD:
                    most = 2.0 * step.n_moved
                if new < loss:
                    refused.add(candidate.text)
                    candidate, loss, n_failed = step.candidate, new, 0
                    self.solutions[target] = [candidate]
                    break
                refused.add(step.candidate.text)
            if further and (n_failed or before - loss < ENOUGH * before):
                fidelity, refused, n_failed = further.pop(0), set(), 0
                (loss,) = yield [Proposal(candidate, fidelity)]
            if not further and math.isfinite(loss):
                self.losses[candidate.text] = loss


class TrustRegion(ProcedureController):
    """Steps for each target from the curvature's solution, by the gradient at the present candidate.

    See `TrustRegionProcedure`. It ends where no step helps, and is deterministic.

    When to use it: the fewest tokens in a separable space. It keeps one worker a target busy: with many workers, and to
    go on where it ends, use `evolution` with `start: trust_region`.

    Raises:
        ValueError: if the space is not separable, or the fidelities are out of order.
    """

    ending = "no step lowers the loss of any target any more"

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,  # unused
        settings: TrustRegionSettings,
        objective: str = "loss",
    ) -> None:
        super().__init__(objective)
        separable = check_separable(space, "trust_region")
        self._procedure = TrustRegionProcedure(separable, fidelities, settings, self.effects)
        self._open(self._procedure.run())

    @property
    def n_measurements(self) -> int:
        return self._procedure.n_measurements
