from __future__ import annotations

import numpy as np
import pytest

from secateur.search.controller import Trial
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.controllers.knapsack import Knapsack, by_table, equal_steps
from secateur.search.controllers.sensitivity import SensitivitySettings
from secateur.search.controllers.separable import removed_energy
from secateur.search.controllers.surrogate.controller import Surrogate, SurrogateSettings
from secateur.search.controllers.surrogate.features import Features, smooth_table
from secateur.search.controllers.surrogate.regression import USUAL_SCALE, Regression
from secateur.search.settings.settings import settings_from
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import ModelShape, Unit
from tests.formula_toy import formula_space

SHAPE = ModelShape(n_params=10**9, bytes_per_param=2, macs_per_token=10**9, kv_bytes_per_token=10)
FIDELITIES = tuple(Fidelity("search", n_tokens) for n_tokens in (512, 2048, 8192))
SIZES = (300, 100, 100, 300, 800, 800, 800)
SENSITIVITY = SurrogateSettings(prior="sensitivity", sensitivity=SensitivitySettings(levels=[0.6]))


def space_of(n_units: int = 21, targets: tuple[float, ...] = (0.6,)) -> AllocationSpace:
    units = [Unit(f"u{i}", (100 * SIZES[i % 7],), i // 7, (f"u{i}",)) for i in range(n_units)]
    return AllocationSpace(units, (), [i / 20 for i in range(20)], targets, SHAPE)


class Errors:
    """Loss of errors that are correlated between slots and saturate, so that it does not add up over slots."""

    def __init__(self, n_units: int, seed: int) -> None:
        rng = np.random.default_rng(1000 + seed)
        self.weights = np.exp(rng.normal(0, 1, n_units))
        mixed = rng.normal(size=(n_units, 3 * n_units))
        shared = mixed @ mixed.T / (3 * n_units)
        scale = 1 / np.sqrt(np.diag(shared))
        self.correlation = scale[:, None] * shared * scale

    def exact(self, candidate) -> float:
        error = np.sqrt(self.weights * removed_energy(np.array(candidate.levels) / 20))
        total = error @ self.correlation @ error
        return float(total / (1 + total / 50))

    def measure(self, candidate, fidelity) -> Measurement:
        noise = np.random.default_rng((*candidate.levels, fidelity.n_tokens)).normal() / np.sqrt(
            fidelity.n_tokens
        )
        return Measurement(candidate.text, fidelity, {"loss": self.exact(candidate) * np.exp(noise)})


def found(controller, errors: Errors, n: int, n_workers: int = 1) -> float:
    """Exact loss of the best elite after n measurements, each told when all workers have been asked for."""
    pending, n_told = [], 0
    while n_told < n:
        while len(pending) < n_workers and (proposals := controller.ask(1)):
            pending += proposals
        proposal = pending.pop(0)
        controller.tell([Trial(n_told, errors.measure(proposal.candidate, proposal.fidelity))])
        n_told += 1
    return errors.exact(controller.elites[0][0])


def test_it_finds_more_than_evolution_at_equal_measurements():
    ratios = []
    for seed in range(3):
        errors, space = Errors(21, seed), space_of()
        other = found(Evolution(space, FIDELITIES, seed, EvolutionSettings()), errors, 400)
        ratios.append(found(Surrogate(space, FIDELITIES, seed, SurrogateSettings()), errors, 400) / other)
    assert np.median(ratios) < 0.9


def test_many_workers_find_about_as_much_as_one():
    ratios = []
    for seed in range(3):
        errors, space = Errors(21, seed), space_of()
        one, many = (
            found(Surrogate(space, FIDELITIES, seed, SurrogateSettings()), errors, 500, n) for n in (1, 64)
        )
        ratios.append(many / one)
    assert np.median(ratios) < 1.1


def test_a_measured_prior_is_solved_first_and_improved_on():
    errors, space = Errors(21, 0), space_of()
    controller = Surrogate(space, FIDELITIES, 0, SENSITIVITY)
    first = found(controller, errors, controller.n_measurements + 2)
    assert first < errors.exact(space.baselines()["uniform@0.6"])
    assert found(controller, errors, 300) < first


def test_targets_teach_each_other():
    """Slots learnt at one target are known at the other."""
    errors, space = Errors(21, 0), space_of(targets=(0.5, 0.6))
    controller = Surrogate(space, FIDELITIES[:1], 0, SurrogateSettings(offspring=8))
    at_second = [p for p in controller.ask(400) if space.target_of(p.candidate) == 1]
    assert at_second
    n_told = 0
    while n_told < 150:
        for proposal in controller.ask(8):
            n_told += 1
            if space.target_of(proposal.candidate) == 0:
                controller.tell([Trial(n_told, errors.measure(proposal.candidate, proposal.fidelity))])
    model = controller._model
    model.refit()
    assert errors.exact(model.best(1)) < 0.9 * errors.exact(space.baselines()["uniform@0.6"])


def test_infeasible_candidates_are_learnt_to_be_bad():
    errors, space = Errors(21, 0), space_of()
    controller = Surrogate(space, FIDELITIES[:1], 0, SurrogateSettings())
    late = []
    for n_told in range(320):
        (proposal,) = controller.ask(1)
        m = errors.measure(proposal.candidate, proposal.fidelity)
        if proposal.candidate.levels[4] >= 13:
            m = Measurement(m.candidate, m.fidelity, infeasible="the fifth unit breaks")
            late.append(n_told)
        controller.tell([Trial(n_told, m)])
    assert controller.elites[0][0].levels[4] < 13
    assert sum(n >= 160 for n in late) < sum(n < 160 for n in late)


def test_without_evidence_the_best_candidate_is_about_uniform():
    space = space_of()
    table = smooth_table(space)
    choice = Knapsack(space._table, *space.usage_bounds(0)).solve(table)
    assert set(np.array(choice) / 20) <= {0.55, 0.6, 0.65}


def test_other_spaces_are_refused():
    with pytest.raises(ValueError, match="whose slots can be measured alone for `surrogate`"):
        Surrogate(formula_space(), FIDELITIES, 0, SurrogateSettings())


def test_settings_are_read():
    settings = settings_from({"controller": {"kind": "surrogate", "prior": "sensitivity", "offspring": 4}})
    assert settings.controller.offspring == 4
    assert settings.controller.sensitivity.levels is None


# --- the regression ---


def test_the_posterior_is_that_of_the_normal_equations():
    rng = np.random.default_rng(0)
    features, values = rng.normal(size=(40, 6)), rng.normal(size=40)
    mean, deviation = rng.normal(size=6), rng.uniform(0.5, 2, 6)
    model = Regression(mean, deviation, np.zeros(6, dtype=bool), (2, 1), 1.0)
    model.add(features[:25], values[:25], 0)
    model.add(features[25:], values[25:], 1)
    model.fit()
    precision = np.diag(deviation**-2) + features.T @ features / USUAL_SCALE**2
    moment = mean / deviation**2 + features.T @ values / USUAL_SCALE**2
    np.testing.assert_allclose(model.mean, np.linalg.solve(precision, moment))
    draws = np.array([model.draw(np.random.default_rng(i)) for i in range(4000)])
    covariance = np.linalg.inv(precision)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.1 * np.diag(covariance).max())


def test_observations_can_be_taken_back():
    rng = np.random.default_rng(0)
    features, values = rng.normal(size=(30, 4)), rng.normal(size=30)
    models = []
    for moved in (False, True):
        model = Regression(np.zeros(4), np.ones(4), np.ones(4, dtype=bool), (1, 3), 1.0)
        model.add(features[:10], values[:10], 0)
        if moved:
            model.add(features[10:], values[10:], 1)
            model.add(features[10:], values[10:], 1, -1)
        model.add(features[10:], values[10:], 2)
        model.fit()
        models.append(model)
    np.testing.assert_allclose(models[0].mean, models[1].mean)


def test_residual_scales_and_the_spread_of_weights_are_found():
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.3, 20)
    model = Regression(np.zeros(20), np.ones(20), np.ones(20, dtype=bool), (2, 1), 3.0)
    for group, scale in enumerate((0.1, 0.5)):
        features = rng.normal(size=(300, 20))
        model.add(features, features @ weights + scale * rng.normal(size=300), group)
    for _ in range(12):
        model.fit()
    assert model.scales.ravel() == pytest.approx([0.1, 0.5], rel=0.1)
    assert model.spread == 0.3
    np.testing.assert_allclose(model.mean, weights, atol=0.03)


def test_features_are_the_sum_of_slot_losses():
    """A candidate's log-loss, and its slots' losses with the neighbours where they are, differ by pairs alone."""
    space, rng = space_of(7), np.random.default_rng(0)
    table = smooth_table(space)
    center = [12] * 7
    features = Features(space, table, sum(float(row[12]) for row in table), center)
    weights = np.zeros(features.n)
    weights[:15] = [1.0, *rng.uniform(-0.1, 0.1, 14)]
    positions = rng.integers(0, 20, 7)
    losses = features.slot_losses(weights, center)
    total = sum(row[i] for row, i in zip(losses, positions, strict=True))
    assert features.of(positions[None])[0] @ weights == pytest.approx(total)
    pair = np.zeros(features.n)
    pair[15] = 1.0  # of the first two slots
    alone = features.slot_losses(pair, positions)[0][positions[0]]
    assert features.of(positions[None])[0] @ pair == pytest.approx(alone)


# --- the exact solver ---


@pytest.mark.parametrize("seed", range(20))
def test_options_excluded_by_the_dual_are_in_no_better_choice(seed):
    rng = np.random.default_rng(seed)
    usages = [[round(size * level / 20) for level in range(20)] for size in rng.choice(SIZES, 30)]
    losses = [np.maximum.accumulate(rng.gamma(0.5) * removed_energy(np.arange(20) / 20)) for _ in usages]
    losses = [loss + rng.choice([0.0, 0.3]) * rng.random(20) for loss in losses]
    losses[0][15:] = np.inf
    middle = int(sum(row[-1] for row in usages) * rng.uniform(0.1, 0.95)) // 20 * 20
    steps = equal_steps(usages, middle - 2, middle + 2)
    assert steps is not None
    assert Knapsack(usages, middle - 2, middle + 2).solve(losses) == by_table(losses, *steps)
