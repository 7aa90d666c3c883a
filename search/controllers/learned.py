"""The controller `learned`: logits of every slot's options, learned by gradients at candidates drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from secateur.search.controller import Proposal
from secateur.search.controllers.knapsack import Array
from secateur.search.controllers.local_model import DAMPING, curvature_fidelity, quadratic
from secateur.search.controllers.procedure import (
    Key,
    ProcedureController,
    SearchProcedure,
    check_fidelities,
    side_by_side,
)
from secateur.search.controllers.separable import TargetSolver, check_separable
from secateur.spaces.measurement import Effects, Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import SeparableSpace, Space

LOWEST = 0.1
"""Temperature of the noise at the end; it falls from 1 in equal steps."""

DECAY = 0.9
"""Of the running mean of the median slopes, by which slopes are divided."""


class LearnedSettings(Section):
    """Settings of the controller `learned`.

    Args:
        steps: of each target.
        samples: candidates drawn in a step, which are measured side by side.
        rate: change of a logit in the first steps by a slope of median size; it falls with the temperature.
        every: steps between two measurements of the likeliest candidate.
        n_tokens: of a gradient; None: 2,048, or what is nearest among the fidelities.
    """

    kind: Literal["learned"] = "learned"
    steps: int = Field(default=24, ge=1)
    samples: int = Field(default=2, ge=1)
    rate: float = Field(default=0.5, gt=0)
    every: int = Field(default=4, ge=1)
    n_tokens: int | None = Field(default=None, gt=0)


class LearnedChoice:
    """Logits of a target's options by slot, at first highest at the uniform candidate's.

    The relaxed choice of MaskLLM (Fang et al. 2024, arXiv 2409.17481), over the options of a slot in place of the masks
    of a group: the weight of a slot is the mean of its options' by a softmax. The slope of the loss in an option's
    share is the first-order effect of switching to it, which a measurement of the part ``gradient`` gives, taken at a
    drawn candidate (straight-through); with the dense model's curvature, as the options are far apart. The budget is
    held by projection: a draw is the candidate of the target with the highest sum of logits and Gumbel noise.

    Args:
        space: of the candidates.
        target: index of the target.
        start: candidate whose options are likeliest at first.
    """

    def __init__(self, space: SeparableSpace[Any], target: int, start: Any) -> None:
        self._solver, self._space = TargetSolver(space, target), space
        options = [list(space.options(slot)) for slot in range(len(space.slots))]
        at = [row.index(own) for row, own in zip(options, space.disassemble(start), strict=True)]
        self.logits: list[Array] = [
            -0.5 * np.square(np.arange(len(row)) - own) for row, own in zip(options, at, strict=True)
        ]
        self._size = 0.0

    def likeliest(self) -> Any | None:
        """The candidate of the target with the highest sum of logits."""
        return self._solver.solve([-row for row in self.logits])

    def draw(self, temperature: float, rng: np.random.Generator) -> Any | None:
        """The likeliest candidate after noise was added to the logits."""
        return self._solver.solve([-(row + temperature * rng.gumbel(size=len(row))) for row in self.logits])

    def slopes(self, effects: Sequence[Effects]) -> list[Array]:
        """Natural slope of the loss in each logit: ``e - sum p e`` with e the mean effects and p the softmax.

        Natural, so exponentiated gradient (Kivinen and Warmuth 1997, https://doi.org/10.1006/inco.1996.2612): the plain
        slope has a factor p, by which unlikely options would keep their first logits.
        """
        curves = [quadratic(each, DAMPING) for each in effects]
        found = []
        for slot, row in enumerate(self.logits):
            mean = np.mean([curve[slot] for curve in curves], axis=0)
            chances = np.exp(row - row.max())
            chances /= chances.sum()
            found.append(mean - chances @ mean)
        return found

    def learn(self, effects: Sequence[Effects], rate: float) -> None:
        """Take a step against the slopes, over their median size among all options, a running mean over steps."""
        slopes = self.slopes(effects)
        sizes = np.abs(np.concatenate(slopes))
        median = float(np.median(sizes[sizes > 0])) if sizes.any() else 1.0
        self._size = DECAY * self._size + (1 - DECAY) * median if self._size else median
        rate /= self._size
        self.logits = [row - rate * slope for row, slope in zip(self.logits, slopes, strict=True)]


class Learned(ProcedureController):
    """Logits of options learned for each target, see `LearnedChoice`; the likeliest candidates are measured on the way.

    When to use it: as a baseline of learned masks beside searches, at equal tokens: a gradient costs three times its
    tokens. `samples` times the targets are measured side by side.

    Raises:
        ValueError: if the space is not separable, or the fidelities are out of order.
    """

    ending = "all steps of every target are taken"

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,
        settings: LearnedSettings,
        objective: str = "loss",
    ) -> None:
        super().__init__(objective)
        self._space, self._seed, self._settings = check_separable(space, "learned"), seed, settings
        self._largest = check_fidelities(fidelities)[-1]
        self._gradient = curvature_fidelity(fidelities, settings.n_tokens)
        self._open(side_by_side([self._of_target(target) for target in range(len(space.targets))]))

    @property
    def n_measurements(self) -> int:
        return 2 * len(self._space.targets)

    def _of_target(self, target: int) -> SearchProcedure:
        of, start = self._settings, list(self._space.baselines().values())[1 + target]
        choice, known = LearnedChoice(self._space, target, start), set[str]()
        for step in range(of.steps):
            temperature = 1 - (1 - LOWEST) * step / max(of.steps - 1, 1)
            rng = np.random.default_rng([self._seed, target, step])
            drawn = [choice.draw(temperature, rng) for _ in range(of.samples)]
            proposals = [Proposal(each, self._gradient) for each in drawn if each is not None]
            new = [each for each in proposals if each.key not in self.effects]
            if new:
                yield new
            effects = _found(proposals, self.effects)
            if effects:
                choice.learn(effects, of.rate * temperature)
            if (step + 1) % of.every == 0 or step + 1 == of.steps:
                best = choice.likeliest()
                if best is not None and best.text not in known:
                    known.add(best.text)
                    yield [Proposal(best, self._largest)]


def _found(proposals: Sequence[Proposal], effects: Mapping[Key, Effects]) -> list[Effects]:
    """Effects of those that are feasible."""
    return [effects[each.key] for each in proposals if each.key in effects]
