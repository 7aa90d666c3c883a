"""Spaces whose parameters apply under conditions, as Optuna sees them."""

from __future__ import annotations

from functools import partial

import numpy as np
import optuna
import pytest

from secateur.search.controller import Trial
from secateur.search.controllers.optuna.ordered import OrderedParameters
from secateur.search.controllers.optuna.study import SampledStudy
from secateur.search.controllers.random import Random, RandomSettings
from secateur.spaces.measurement import Measurement
from tests.recipe_toy import Landscape, recipe_space
from tests.test_optuna_controller import FIDELITIES, LARGEST, best_loss, build, inside, spend


def landscape(seed: int = 0, **settings) -> Landscape:
    parts = {"unit": "weights", "target": 0.5, "search": ["metric", "allocation", "repair"]}
    return Landscape(recipe_space(**{**parts, **settings}), seed)


def test_tpe_beats_random_recipes():
    found, random = [], []
    for seed in range(10):
        land = landscape(seed)
        measure = partial(land, fidelity=LARGEST)
        found.append(best_loss(spend(build(land.space, seed=seed, start=8), measure, 36)))
        random.append(best_loss(spend(Random(land.space, FIDELITIES, seed, RandomSettings()), measure, 36)))
    assert np.mean(found) < 0.6 * np.mean(random)
    assert sum(a < b for a, b in zip(found, random, strict=True)) >= 8


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "cmaes"])
def test_trials_hold_the_parameters_that_apply(sampler):
    land = landscape()
    options = {"n_startup_trials": 7} if sampler == "gp" else {}
    controller = build(land.space, sampler, start=4, options=options)
    done = spend(controller, partial(land, fidelity=LARGEST), 30)
    trials = [t for t in inside(controller).trials if t.state.name == "COMPLETE"]
    assert len(trials) == len(done) == 30
    for trial, measurement in zip(trials, done, strict=True):
        assert trial.params == land.space.to_parameters(land.space.parse(measurement.candidate))
        assert trial.values == [measurement.values["loss"]]
    assert len({frozenset(trial.params) for trial in trials}) > 3
    kinds = {name: type(d).__name__ for t in trials for name, d in t.distributions.items()}
    assert kinds["metric.name"] == "CategoricalDistribution"
    assert kinds["metric.magnitude"] == "IntDistribution"


def test_a_trial_is_replaced_where_its_parameters_do_not_apply():
    """Few recipes are new here, so that most proposals end up elsewhere."""
    land = landscape(metrics=["wanda", "blend"], search=["metric"], known=[])
    study = SampledStudy(land.space, (0,), ("loss",), "random", {}, 0)
    wanda = land.space.baselines()["wanda@0.5"]
    study.start_with(land.space.sample(np.random.default_rng(2), 0), 0)
    study.start_with(wanda, 0)
    for _ in range(20):
        found = study.ask(lambda recipe: "metric wanda" not in recipe.text and "order=none" in recipe.text)
        assert found is not None
        trial, recipe = found
        study.tell(trial, Trial(0, Measurement(recipe.text, LARGEST, {"loss": 1.0})))
        assert study._study.trials[trial.number].params == land.space.to_parameters(recipe)
    states = [t.state.name for t in study._study.trials]
    assert states.count("COMPLETE") == 20
    assert states.count("FAIL") >= 1


def spied(monkeypatch) -> list[tuple[int, dict[str, int], dict[str, int]]]:
    """Numbers of trials, TPE's values, and what came in their place."""
    seen = []
    proposed = OrderedParameters.proposed

    def spy(self, trial, values):
        found = proposed(self, trial, values)
        seen.append((trial.number, dict(values), found))
        return found

    monkeypatch.setattr(OrderedParameters, "proposed", spy)
    return seen


def test_gp_proposes_the_ordered_parameters_that_apply(monkeypatch):
    seen = spied(monkeypatch)
    land = landscape(search=["metric", "repair"], metrics=["wanda", "blend"])
    ordered = {p.name for p in land.space.parameters() if not p.categorical}
    study = SampledStudy(land.space, (0,), ("loss",), "gp", {"n_startup_trials": 4}, 0)
    told = []
    for i in range(20):
        trial, recipe = study.ask(lambda recipe: True)
        infeasible = "too large" if i == 8 else None
        values = {} if infeasible else land(recipe, LARGEST).values
        study.tell(trial, Trial(i, Measurement(recipe.text, LARGEST, values, infeasible)))
        told.append(study._study.trials[trial.number])
        assert told[-1].params == land.space.to_parameters(recipe)
    assert told[8].constraints == {"infeasible": 1.0}  # TPE heeds it
    anew = [(number, values, found) for number, values, found in seen if found]
    assert len(anew) >= 6
    for number, values, found in anew:
        assert found.keys() == ordered & values.keys()
        assert sum(t.number < number and found.keys() <= t.params.keys() for t in told) >= 4
        (trial,) = (t for t in told if t.number == number)
        assert trial.params == {**values, **found}
    assert sum(any(values[name] != x for name, x in found.items()) for _, values, found in anew) >= 5
    few = [number for number, values, found in seen if "metric.angle" in values and not found]
    assert sum("metric.angle" in t.params for t in told if t.number < max(few)) < 4


def test_gp_fits_the_other_trials_that_hold_these_parameters(monkeypatch):
    land = landscape(search=["metric"], metrics=["blend"], known=[])
    controller = build(land.space, "gp", start=16)
    spend(controller, partial(land, fidelity=LARGEST), 16)
    controller.ask(2)  # under way
    seen = []
    sample = optuna.samplers.GPSampler.sample_relative

    def spy(self, study, trial, search_space):
        seen.append((study, search_space))
        return sample(self, study, trial, search_space)

    monkeypatch.setattr(optuna.samplers.GPSampler, "sample_relative", spy)
    while not seen:
        controller.ask(1)
    (alone, names), real = seen[-1], inside(controller)
    holding = [t for t in real.trials[:-1] if names.keys() <= t.params.keys() and t.state.name != "FAIL"]
    assert [(t.params, t.values) for t in alone.trials[:-1]] == [
        ({name: t.params[name] for name in names}, t.values) for t in holding
    ]
    assert "metric.magnitude" in names
    assert {"COMPLETE", "RUNNING"} == {t.state.name for t in holding}


def test_gp_proposes_the_same_again_and_leaves_the_start_alone():
    found = []
    for _ in range(2):
        land = landscape(search=["metric"], metrics=["blend"], known=[])
        controller = build(land.space, "gp", start=6, options={"n_startup_trials": 3})
        np.random.default_rng().random(), np.random.random()  # noqa: NPY002
        found.append([m.candidate for m in spend(controller, partial(land, fidelity=LARGEST), 12, batch=2)])
    assert found[0] == found[1]
    tpe = build(land.space, start=6)
    assert [m.candidate for m in spend(tpe, partial(land, fidelity=LARGEST), 12, batch=2)][:6] == found[0][:6]


def test_gp_beats_random_recipes_where_ordered_parameters_count():
    found, random = [], []
    for seed in range(6):
        land = landscape(seed, search=["metric"], metrics=["blend"], known=[])
        land._weights = {c.path: land._weights[c.path] * c.ordered for c in land.space.choices}
        measure = partial(land, fidelity=LARGEST)
        controller = build(land.space, "gp", seed=seed, start=6, options={"n_startup_trials": 6})
        found.append(best_loss(spend(controller, measure, 18, batch=1)))
        random.append(best_loss(spend(Random(land.space, FIDELITIES, seed, RandomSettings()), measure, 18)))
    assert np.mean(found) < 0.3 * np.mean(random)
    assert sum(a <= b for a, b in zip(found, random, strict=True)) >= 5


def test_gp_is_slow_with_many_ordered_parameters_alone():
    weights, structure = (recipe_space(unit=unit, target=0.5) for unit in ("weights", "structure"))
    assert len(weights.parameters()) > 15
    build(weights, "gp")  # warns of nothing
    with pytest.warns(UserWarning, match="sampler gp with 18 parameters takes seconds"):
        build(structure, "gp")


@pytest.mark.parametrize("options", [{"n_startup": 4}, {"seed": 1}, {"multivariate": True}])
def test_gp_takes_its_own_options(options):
    with pytest.raises(ValueError, match="Expected known `options` of the sampler gp"):
        build(landscape().space, "gp", options=options)


def test_known_recipes_that_no_option_leads_to_are_left_to_the_study():
    land = landscape(metrics=["blend"], search=["metric"], known=["owl"])
    controller = build(land.space, start=0)
    assert inside(controller).get_trials(states=[optuna.trial.TrialState.WAITING]) == []
    assert "metric blend" in controller.ask(1)[0].candidate.text
