"""The controller `evolution`: what it finds at equal tokens, its generations, elites and settings."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from secateur.search.controller import Trial
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.controllers.random import Random, RandomSettings
from secateur.search.controllers.sensitivity import SensitivitySettings
from secateur.search.controllers.separable import removed_energy
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Measurement
from tests.landscapes import FIDELITIES, Landscape, space_of, spend


def best_loss(landscape: Landscape, controller, n_tokens: int = 400_000) -> float:
    """Exact loss of the candidate that measured best at the largest fidelity."""
    done = spend(controller, landscape.measure, n_tokens)
    final = [p.candidate for p in done if p.fidelity == FIDELITIES[-1] and p.candidate.levels != (0,) * 21]
    return landscape.exact(min(final, key=lambda c: landscape.measure(c, FIDELITIES[-1]).values["loss"]))


@cache
def random_loss(seed: int) -> float:
    """Best loss of random search on the landscape of this seed."""
    landscape = Landscape(space_of(21), seed)
    return best_loss(landscape, Random(landscape.space, FIDELITIES, seed, RandomSettings()))


@pytest.mark.parametrize("settings", [{}, {"parents": 4}, {"start": "random"}], ids=str)
def test_evolution_beats_random_at_equal_tokens(settings):
    ratios = []
    for seed in range(10):
        landscape = Landscape(space_of(21), seed)
        found = best_loss(
            landscape, Evolution(landscape.space, FIDELITIES, seed, EvolutionSettings(**settings))
        )
        ratios.append(found / random_loss(seed))
    assert max(ratios) < 1
    assert np.median(ratios) < 0.5


def test_evolution_with_exact_losses_reaches_the_optimum():
    found = []
    for seed in range(10):
        landscape = Landscape(space_of(7), seed)
        controller = Evolution(landscape.space, FIDELITIES[:1], seed, EvolutionSettings())
        spend(
            controller,
            lambda c, f, exact=landscape.exact: Measurement(c.text, f, {"loss": exact(c)}),
            500 * 512,
        )
        found.append(controller.elites[0][0] == landscape.best)
    assert sum(found) >= 7


def test_evolution_starts_from_sensitivity_and_needs_fewer_tokens():
    wins = 0
    for seed in range(10):
        space = space_of(35)
        rng = np.random.default_rng(1000 + seed)
        weights = np.exp(rng.normal(0, 1.2, 35))
        pairs = rng.random((35, 35)) * 0.05

        def loss(c, weights=weights, pairs=pairs) -> float:
            error = removed_energy(np.array(c.levels) / 10)
            return float(weights @ error + error @ pairs @ error)

        def found(settings, n_tokens, space=space, loss=loss, seed=seed) -> float:
            controller = Evolution(space, FIDELITIES, seed, settings)
            spend(controller, lambda c, f: Measurement(c.text, f, {"loss": loss(c)}), n_tokens)
            return loss(controller.elites[0][0])

        warm = EvolutionSettings(start="sensitivity", sensitivity=SensitivitySettings(levels=[0.6]))
        wins += found(warm, 150_000) < found(EvolutionSettings(), 300_000)
    assert wins == 10


def test_migration_helps_where_targets_share_their_structure():
    def best(migration: float) -> float:
        total = 0.0
        for seed in range(10):
            space = space_of(21, targets=(0.4, 0.5, 0.6))
            weights = np.exp(np.random.default_rng(seed).normal(0, 1.5, 21))

            def measure(c, f, w=weights) -> Measurement:
                return Measurement(c.text, f, {"loss": float(w @ np.square(c.levels))})

            controller = Evolution(space, FIDELITIES[:1], seed, EvolutionSettings(migration=migration))
            spend(controller, measure, 450 * 512)
            total += sum(float(weights @ np.square(elites[0].levels)) for elites in controller.elites)
        return total

    assert best(0.2) < best(0.0)


# --- generations ---


def test_offspring_are_promoted_by_successive_halving():
    landscape = Landscape(space_of(21), 0)
    controller = Evolution(landscape.space, FIDELITIES, 0, EvolutionSettings(survivors=[8, 2]))
    (uniform,) = spend(controller, landscape.measure, 1)
    assert uniform.candidate == landscape.space.baselines()["uniform@0.6"]
    assert uniform.fidelity == FIDELITIES[-1]
    generation = spend(controller, landscape.measure, 16 * 512 + 8 * 2048 + 2 * 8192)
    assert Counter(p.fidelity.n_tokens for p in generation) == {512: 16, 2048: 8, 8192: 2}
    for fidelity, n_next in ((0, 8), (1, 2)):
        measured = [p.candidate for p in generation if p.fidelity == FIDELITIES[fidelity]]
        measured.sort(key=lambda c: landscape.measure(c, FIDELITIES[fidelity]).values["loss"])
        promoted = [p.candidate for p in generation if p.fidelity == FIDELITIES[fidelity + 1]]
        assert promoted == measured[:n_next]


def test_elites_never_get_worse_and_are_measured_at_the_largest_fidelity():
    landscape = Landscape(space_of(21), 3)
    controller = Evolution(landscape.space, FIDELITIES, 3, EvolutionSettings(parents=3))
    done, losses = [], []
    for _ in range(10):
        done += spend(controller, landscape.measure, 30_000)
        (elites,) = controller.elites
        at_largest = {p.candidate for p in done if p.fidelity == FIDELITIES[-1]}
        assert set(elites) <= at_largest
        losses.append([landscape.measure(c, FIDELITIES[-1]).values["loss"] for c in elites])
    assert all(row == sorted(row) for row in losses)
    assert [row[0] for row in losses] == sorted((row[0] for row in losses), reverse=True)


def test_infeasible_candidates_are_never_elites():
    space = space_of(21)

    def measure(candidate, fidelity):
        if candidate.levels[0] != 6:
            return Measurement(candidate.text, fidelity, infeasible="the first unit must stay")
        return Measurement(candidate.text, fidelity, {"loss": float(np.var(candidate.levels[:3]))})

    controller = Evolution(space, FIDELITIES, 0, EvolutionSettings(parents=5))
    spend(controller, measure, 500_000)
    assert len(controller.elites[0]) > 1
    assert all(candidate.levels[0] == 6 for candidate in controller.elites[0])


def test_a_search_whose_start_is_infeasible_goes_on_with_random_candidates():
    space = space_of(21)
    uniform = space.baselines()["uniform@0.6"]

    def measure(candidate, fidelity):
        if candidate == uniform:
            return Measurement(candidate.text, fidelity, infeasible="not this one")
        return Measurement(candidate.text, fidelity, {"loss": 1.0})

    controller = Evolution(space, FIDELITIES, 0, EvolutionSettings())
    spend(controller, measure, 200_000)
    assert controller.elites[0]


def test_late_generations_share_the_blocks_before_a_random_depth():
    def depths(late: float) -> list[float]:
        """Share of the blocks before the first one in which the offspring of a generation differ."""
        landscape, found = Landscape(space_of(70), 0), []
        controller = Evolution(landscape.space, FIDELITIES[:1], 0, EvolutionSettings(offspring=6, late=late))
        for n in (1, *[6] * 60):
            proposals = controller.ask(n)
            measured = [landscape.measure(proposal.candidate, proposal.fidelity) for proposal in proposals]
            controller.tell([Trial(0, measurement) for measurement in measured])
            by_slot = zip(*[proposal.candidate.levels for proposal in proposals], strict=True)
            different = (slot for slot, levels in enumerate(by_slot) if len({*levels}) > 1)
            found.append(landscape.space.block_of(next(different, 0)) / 10)
        return found[1:]

    usual, late = depths(0.0), depths(1.0)
    assert np.mean(usual) < 0.1
    assert 0.35 < np.mean(late) < 0.65, "the depth is uniform"
    assert min(late) < 0.1
    assert max(late) > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_late_generations_find_as_much(seed):
    landscape = Landscape(space_of(21), seed)
    found = best_loss(landscape, Evolution(landscape.space, FIDELITIES, seed, EvolutionSettings(late=0.5)))
    assert found < 0.7 * random_loss(seed)


# --- settings ---


def test_a_measurement_without_the_objective_is_refused():
    controller = Evolution(space_of(7), FIDELITIES, 0, EvolutionSettings(), objective="ce")
    (proposal,) = controller.ask(1)
    with pytest.raises(ValueError, match="Expected `objective` to be one of loss, got 'ce'"):
        controller.tell([Trial(0, Measurement(*proposal.key[:1], proposal.fidelity, {"loss": 1.0}))])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offspring": 0}, "Expected `controller.offspring` to be greater than or equal to 1, got 0"),
        ({"parents": 0}, "Expected `controller.parents` to be greater than or equal to 1, got 0"),
        ({"crossover": 1.5}, "Expected `controller.crossover` to be less than or equal to 1, got 1.5"),
        ({"migration": -1}, "Expected `controller.migration` to be greater than or equal to 0, got -1"),
        ({"survivors": [4, 8]}, "Expected `controller.survivors` to descend"),
        ({"survivors": [32, 1]}, "Expected `controller.survivors` to descend"),
        ({"survivors": [4, 0]}, "Expected `controller.survivors` to descend"),
        ({"start": "warm"}, "start"),
        (
            {"sensitivity": {"levels": [0]}},
            "Expected `controller.sensitivity.levels.0` to be greater than 0, got 0",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        settings_from({"controller": {"kind": "evolution", **settings}})


def test_survivors_fit_the_fidelities():
    with pytest.raises(ValueError, match=re.escape("after the first (2), got [4]")):
        Evolution(space_of(7), FIDELITIES, 0, EvolutionSettings(survivors=[4]))
