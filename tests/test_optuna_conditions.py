"""Spaces whose parameters apply under conditions, as Optuna sees them."""

from __future__ import annotations

from functools import partial

import numpy as np
import optuna
import pytest

from secateur.search.controller import Trial
from secateur.search.controllers.optuna_study import SampledStudy
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


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes"])
def test_trials_hold_the_parameters_that_apply(sampler):
    land = landscape()
    controller = build(land.space, sampler, start=4)
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


def test_gp_models_what_always_applies():
    land = landscape(search=["metric", "repair"], metrics=["wanda", "blend"])
    controller = build(land.space, "gp", start=3, options={"n_startup_trials": 4})
    assert len({m.candidate for m in spend(controller, partial(land, fidelity=LARGEST), 6)}) == 6
    sampler = inside(controller).sampler
    assert set(sampler.infer_relative_search_space(None, None)) == {
        "metric.name",
        "metric.comparison",
        "repair",
    }


def test_known_recipes_that_no_option_leads_to_are_left_to_the_study():
    land = landscape(metrics=["blend"], search=["metric"], known=["owl"])
    controller = build(land.space, start=0)
    assert inside(controller).get_trials(states=[optuna.trial.TrialState.WAITING]) == []
    assert "metric blend" in controller.ask(1)[0].candidate.text
