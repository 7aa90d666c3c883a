"""The controller `sensitivity`: exact on additive landscapes; its knapsack, and its model of losses."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from secateur.search.controllers.knapsack import Knapsack, by_milp, by_table, equal_steps
from secateur.search.controllers.sensitivity import Sensitivity, SensitivitySettings
from secateur.search.controllers.separable import complete, removed_energy
from secateur.spaces.measurement import Measurement
from tests.landscapes import FIDELITIES, space_of, spend


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


def test_levels_that_hit_only_the_reference_are_refused():
    with pytest.raises(ValueError, match="besides the reference's"):
        Sensitivity(space_of(7), FIDELITIES, 0, SensitivitySettings(around="uniform", levels=[0.6]))
    with pytest.raises(ValueError, match=re.escape("one of the fidelities (512, 2048, 8192), got 100")):
        Sensitivity(space_of(7), FIDELITIES, 0, SensitivitySettings(n_tokens=100))


# --- the knapsack ---


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
