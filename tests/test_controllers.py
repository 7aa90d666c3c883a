from __future__ import annotations

import itertools
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from secateur.search.controller import Trial
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.controllers.knapsack import Knapsack, by_milp, by_table, equal_steps
from secateur.search.controllers.random import Random, RandomSettings
from secateur.search.controllers.sensitivity import Sensitivity, SensitivitySettings
from secateur.search.controllers.separable import complete, removed_energy
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
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


# --- evolution ---


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


# --- sensitivity ---


def brute_force(losses, usages, low, high) -> float:
    """Smallest sum of losses of all choices within the bounds."""
    totals = [
        sum(loss[index] for loss, index in zip(losses, choice, strict=True))
        for choice in itertools.product(*(range(len(row)) for row in usages))
        if low <= sum(row[index] for row, index in zip(usages, choice, strict=True)) <= high
    ]
    return min(totals, default=np.inf)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("equal", [True, False], ids=["equal steps", "any steps"])
def test_the_knapsack_is_solved_exactly(seed, equal):
    rng = np.random.default_rng(seed)
    sizes = rng.choice([10, 30], size=5) if equal else rng.integers(5, 40, size=5)
    usages = [[int(size) * level for level in range(4)] for size in sizes]
    middle = int(sizes.sum()) * 3 // 2
    low, high = (middle, middle) if equal else (middle, middle + int(sizes.min()))
    losses = [np.sort(rng.random(4)) for _ in sizes]
    losses[0][3] = np.inf
    expected = brute_force(losses, usages, low, high)
    choices = [Knapsack(usages, low, high).solve(losses), by_milp(losses, usages, low, high)]
    steps = equal_steps(usages, low, high)
    if equal and steps:
        choices.append(by_table(losses, *steps))
    for choice in choices:
        if choice is None:
            assert expected == np.inf
        else:
            assert sum(losses[i][j] for i, j in enumerate(choice)) == pytest.approx(expected, rel=2e-4)


def test_a_knapsack_without_solution():
    usages = [[0, 10], [0, 10]]
    losses = [np.array([0.0, np.inf]), np.array([0.0, 1.0])]
    assert Knapsack(usages, 20, 20).solve(losses) is None
    assert by_milp(losses, usages, 20, 20) is None


@pytest.mark.parametrize("around", ["dense", "uniform"])
def test_sensitivity_solves_an_additive_landscape_exactly(around):
    space = space_of(5, targets=(0.3, 0.6), levels=(0, 0.3, 0.6, 0.9))
    curves = np.cumsum(np.random.default_rng(0).random((5, 4)), axis=1)

    def loss(c) -> float:
        return float(sum(curve[level] for curve, level in zip(curves, c.levels, strict=True)))

    controller = Sensitivity(space, FIDELITIES, 0, SensitivitySettings(around=around))
    done = spend(controller, lambda c, f: Measurement(c.text, f, {"loss": loss(c)}), 10**9)
    solutions = [p.candidate for p in done if p.fidelity == FIDELITIES[-1]]
    everything = [space.assemble(levels) for levels in itertools.product(range(4), repeat=5)]
    for target, solution in enumerate(solutions):
        best = min((c for c in everything if space.target_of(c) == target), key=loss)
        assert solution == best
    assert len(done) == {"dense": 1 + 5 * 3 + 2, "uniform": 2 * (1 + 5 * 3) + 2}[around]


def test_few_levels_are_enough_on_a_smooth_landscape():
    space = space_of(21)
    weights = np.exp(np.random.default_rng(0).normal(0, 1, 21))

    def loss(c) -> float:
        return float(weights @ removed_energy(np.array(c.levels) / 10))

    controller = Sensitivity(space, FIDELITIES, 0, SensitivitySettings(levels=[0.6], n_tokens=2048))
    done = spend(controller, lambda c, f: Measurement(c.text, f, {"loss": loss(c)}), 10**9)
    assert [p.fidelity.n_tokens for p in done] == [2048] * 22 + [8192]
    full = Sensitivity(space, FIDELITIES, 0, SensitivitySettings())
    best = spend(full, lambda c, f: Measurement(c.text, f, {"loss": loss(c)}), 10**9)[-1].candidate
    assert loss(done[-1].candidate) == pytest.approx(loss(best))
    assert loss(best) < loss(space.baselines()["uniform@0.6"])


def test_infeasible_options_are_not_chosen():
    space = space_of(7)

    def measure(candidate, fidelity):
        if candidate.levels[2] >= 4:
            return Measurement(candidate.text, fidelity, infeasible="the third unit breaks")
        return Measurement(candidate.text, fidelity, {"loss": float(sum(candidate.levels[3:]))})

    done = spend(Sensitivity(space, FIDELITIES, 0, SensitivitySettings()), measure, 10**9)
    assert done[-1].fidelity == FIDELITIES[-1]
    assert done[-1].candidate.levels[2] < 4


def test_nothing_is_proposed_where_the_reference_is_infeasible():
    controller = Sensitivity(space_of(7), FIDELITIES, 0, SensitivitySettings(levels=[0.5]))
    done = spend(controller, lambda c, f: Measurement(c.text, f, infeasible="no"), 10**9)
    assert len(done) == 8


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


def test_levels_that_hit_only_the_reference_are_refused():
    with pytest.raises(ValueError, match="besides the reference's"):
        Sensitivity(space_of(7), FIDELITIES, 0, SensitivitySettings(around="uniform", levels=[0.6]))
    with pytest.raises(ValueError, match=re.escape("one of the fidelities (512, 2048, 8192), got 100")):
        Sensitivity(space_of(7), FIDELITIES, 0, SensitivitySettings(n_tokens=100))


# --- the additive model ---


def test_removed_energy_is_that_of_gaussian_weights():
    shares = np.linspace(0, 1, 11)
    weights = np.sort(np.abs(np.random.default_rng(0).normal(size=200_000)))
    energy = np.concatenate([[0], np.cumsum(weights**2)]) / np.sum(weights**2)
    np.testing.assert_allclose(removed_energy(shares), energy[(shares * 200_000).astype(int)], atol=0.005)
    assert removed_energy(np.array([0.0, 1.0])).tolist() == [0, 1]


def test_completed_losses_pass_through_measurements_and_are_monotone():
    shares = np.linspace(0, 0.9, 10)
    curve = complete(shares, {3: 0.1, 6: 0.5, 8: 2.0}, 0)
    assert curve[[0, 3, 6, 8]] == pytest.approx([0, 0.1, 0.5, 2.0])
    assert (np.diff(curve) >= 0).all()
    assert curve[9] > 2


def test_noise_that_is_not_monotone_is_levelled():
    shares = np.linspace(0, 0.9, 10)
    curve = complete(shares, {3: -0.1, 6: 0.5, 8: 0.3}, 0)
    assert curve[[0, 3, 6, 8]] == pytest.approx([0, 0, 0.4, 0.4])
    around = complete(shares, {4: 0.2, 8: 0.5}, 6)
    assert around[[4, 6, 8]] == pytest.approx([0, 0, 0.5])


def test_one_measurement_scales_the_energy():
    shares = np.linspace(0, 0.9, 10)
    np.testing.assert_allclose(
        complete(shares, {6: 2.0}, 0), 2 * removed_energy(shares) / removed_energy(shares)[6]
    )
    assert complete(shares, {}, 0).tolist() == [0.0] * 10
