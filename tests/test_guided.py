"""Controllers that use gradients, on a landscape whose gradients are known: what they find at equal tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from secateur.search.controller import Trial
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.controllers.trust_region import TrustRegion, TrustRegionSettings
from secateur.spaces.measurement import Effects, Measurement
from tests.landscapes import FIDELITIES, LEVELS, Landscape, space_of

N_TOKENS = 200_000  # a gradient's counted three times


class Sloped(Landscape):
    """The landscape with effects of single switches, a fifth of them noise."""

    def measure(self, candidate, fidelity) -> Measurement:
        if fidelity.part != "gradient":
            return super().measure(candidate, fidelity)
        own, rng = np.array(candidate.levels), np.random.default_rng(np.array(candidate.levels))
        slope = 2 * self.matrix @ (np.subtract(own, self.best.levels) / 10)
        slope *= 1 + 0.2 * rng.normal(size=len(slope))
        apart = (np.arange(len(LEVELS))[None, :] - own[:, None]) / 10
        first = slope[:, None] * apart
        second = np.diag(self.matrix)[:, None] * apart**2 / 2
        effects = Effects(*(tuple(tuple(row) for row in table.tolist()) for table in (first, second)))
        return Measurement(candidate.text, fidelity, {"loss": self.exact(candidate)}, effects=effects)


def searched(landscape: Sloped, controller, n_tokens: int = N_TOKENS) -> list:
    """Proposals measured for so many tokens, one at a time."""
    done = []
    while n_tokens > 0 and (proposals := controller.ask(1)):
        (proposal,) = proposals
        controller.tell([Trial(len(done), landscape.measure(proposal.candidate, proposal.fidelity))])
        n_tokens -= proposal.fidelity.total_tokens
        done.append(proposal)
    return done


def found(landscape: Sloped, **settings) -> float:
    """Exact loss of the first elite of evolution."""
    controller = Evolution(landscape.space, FIDELITIES, 0, EvolutionSettings(**settings))
    searched(landscape, controller)
    return landscape.exact(controller.elites[0][0])


def test_guided_offspring_find_more_for_equal_tokens() -> None:
    ratios = []
    for seed in range(10):
        landscape = Sloped(space_of(21), seed)
        ratios.append(found(landscape, guided=8) / found(landscape))
    assert np.median(ratios) < 0.8


def test_each_elite_has_one_gradient_and_nobody_has_one_unguided() -> None:
    landscape = Sloped(space_of(21), 1)
    controller = Evolution(landscape.space, FIDELITIES, 0, EvolutionSettings(guided=4))
    gradients = [p for p in searched(landscape, controller) if p.fidelity.part == "gradient"]
    assert len({p.key for p in gradients}) == len(gradients) > 2
    assert {p.fidelity.n_tokens for p in gradients} == {2048}
    plain = Evolution(landscape.space, FIDELITIES, 0, EvolutionSettings())
    assert all(p.fidelity.part == "search" for p in searched(landscape, plain))
    curvature = CONTROLLERS["evolution"].curvature
    assert curvature(EvolutionSettings(guided=4), FIDELITIES).text == "gradient:2048"
    assert curvature(EvolutionSettings(), FIDELITIES) is None


class Misled(Sloped):
    """The same with a curvature that is wrong by a factor of up to ten either way in every slot."""

    def measure(self, candidate, fidelity) -> Measurement:
        found = super().measure(candidate, fidelity)
        if fidelity.part != "gradient":
            return found
        wrong = 10 ** np.random.default_rng(0).uniform(-1, 1, size=len(self.matrix))
        second = np.array(found.effects.second) * wrong[:, None]
        return replace(found, effects=replace(found.effects, second=tuple(map(tuple, second.tolist()))))


def test_steps_begin_at_the_uniform_candidate_where_the_solution_of_the_curvature_is_worse() -> None:
    landscape = Misled(space_of(21), 0)
    controller = TrustRegion(landscape.space, FIDELITIES, 0, TrustRegionSettings())
    _, solution, uniform, gradient = searched(landscape, controller, 16_384)[:4]
    assert [p.fidelity.text for p in (solution, uniform, gradient)] == [
        *("search:2048", "search:2048", "gradient:2048")
    ]
    assert uniform.candidate.text == list(landscape.space.baselines().values())[1].text
    assert landscape.exact(solution.candidate) > 1.1 * landscape.exact(uniform.candidate)
    assert gradient.candidate.text == uniform.candidate.text


def test_steps_stay_at_a_fidelity_as_long_as_they_gain_a_twentieth() -> None:
    landscape = Sloped(space_of(21), 5)
    controller = TrustRegion(landscape.space, FIDELITIES, 0, TrustRegionSettings())
    done = searched(landscape, controller, 10**6)
    start = next(i for i, p in enumerate(done) if p.fidelity.part == "gradient" and i > 0)
    steps = [p for p in done[start:] if p.fidelity.part == "search"]
    assert [p.fidelity.n_tokens for p in steps] == sorted(p.fidelity.n_tokens for p in steps)
    at_first = [p for p in steps if p.fidelity.n_tokens == 2048]
    assert len(at_first) >= 2
    losses = [landscape.measure(p.candidate, p.fidelity).values["loss"] for p in at_first]
    best = [min(losses[: i + 1]) for i in range(len(losses))]
    gains = [1 - after / before for before, after in itertools.pairwise(best)]
    assert all(gain >= 0.05 for gain in gains[:-1] if gain > 0)
    assert landscape.exact(steps[-1].candidate) == pytest.approx(0, abs=0.1)
