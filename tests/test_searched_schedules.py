"""Schedules of recipes as choices of a search."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from secateur.search import app
from secateur.search.settings.settings import identity, resolved, settings_from
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.schedule import computed_tokens
from tests.recipe_toy import recipe_space

OPTIONS = {"steps": [1, 4], "shape": ["linear", "cubic"], "retrain": [0, 4096], "lr": [1e-4, 1e-3]}
EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [128], "test_tokens": 256}


def schedules(recipes: list[Recipe]) -> set[str]:
    return {str(recipe.plain.get("schedule")) for recipe in recipes}


def test_samples_vary_the_keys_with_options_and_no_others():
    space = recipe_space(unit="weights", metrics=["wanda"], allocations=["uniform"], schedule=OPTIONS)
    rng = np.random.default_rng(0)
    found = [space.sample(rng, 0) for _ in range(200)]
    shapes = ({}, {"steps": 4}, {"steps": 4, "shape": "cubic"})
    training = ({}, {"retrain": 4096, "lr": 1e-4}, {"retrain": 4096, "lr": 1e-3})
    assert schedules(found) == {str(shape | more or None) for shape in shapes for more in training}
    assert all(space.parse(recipe.text) == recipe for recipe in found)
    trained = [recipe for recipe in found if "retrain" in recipe.plain.get("schedule", {})]
    assert {recipe.plain["repair"] for recipe in trained} == {"none", "obs", "admm"}  # no biases


def test_rounds_give_way_to_what_cannot_go_on():
    space = recipe_space(metrics=["flap", "wanda_sp"], allocations=["flap", "uniform"], schedule=OPTIONS)
    rng = np.random.default_rng(0)
    found = [space.sample(rng, 0).plain for _ in range(100)]
    rules = Counter(x["allocation"]["rule"] for x in found if "steps" in x.get("schedule", {}))
    assert set(rules) == {"uniform"}
    start = recipe_space(start="bonsai", schedule={"steps": [1, 4]})  # whose rounds are of a size
    assert start.known("bonsai", 0).plain["schedule"] == {"step": 0.05}
    assert schedules([start.sample(rng, 0) for _ in range(20)]) <= {"{'step': 0.05}", "None"}
    either = recipe_space(start="bonsai", schedule={"step": [0.05, 1], "steps": [1, 4]})
    assert schedules([either.sample(rng, 0) for _ in range(60)]) == {"{'step': 0.05}", "{'steps': 4}", "None"}


def test_mutation_and_crossover_vary_schedules_from_both_parents():
    space = recipe_space(
        search=["repair"], repairs=["none"], start="wanda_sp", schedule={"steps": [1, 4], "retrain": [0, 64]}
    )
    rng = np.random.default_rng(0)
    first, second = (
        space.from_parameters({"schedule.steps": i, "schedule.retrain": i}, 0, rng) for i in (0, 1)
    )
    assert second.plain["schedule"] == {"steps": 4, "retrain": 64}
    assert {space.crossover(first, second, rng) for _ in range(20)} == {first, second}
    children = [space.mutate(first, rng) for _ in range(40)]
    assert schedules(children) == {"{'steps': 4}", "{'retrain': 64}", "{'steps': 4, 'retrain': 64}"}


def test_parameters_make_schedules_and_what_cannot_count_is_at_its_default():
    space = recipe_space(search=["repair"], repairs=["none"], start="wanda_sp", schedule=OPTIONS)
    rng = np.random.default_rng(0)
    whole = {"schedule.steps": 1, "schedule.shape": 1, "schedule.retrain": 1, "schedule.lr": 0}
    found = space.from_parameters(whole, 0, rng)
    assert found.plain["schedule"] == {"steps": 4, "shape": "cubic", "retrain": 4096, "lr": 1e-4}
    assert space.to_parameters(found) == whole
    untrained = space.from_parameters({**whole, "schedule.retrain": 0, "schedule.lr": 1}, 0, rng)
    assert untrained.plain["schedule"] == {"steps": 4, "shape": "cubic"}
    assert space.from_parameters(space.to_parameters(untrained), 0, rng) == untrained


def test_without_options_draws_and_identity_are_those_of_before():
    """The text is that which the space drew before it had schedules."""
    settings = settings_from({"model": "tiny", "space": {"kind": "recipe", "unit": "weights"}})
    assert "schedule" not in identity(settings)["space"]
    assert resolved(settings)["space"]["schedule"] is None
    rng, space = np.random.default_rng(7), recipe_space(unit="weights")
    found = [space.sample(rng, 0) for _ in range(3)]
    for _ in range(20):
        child = space.crossover(found[-1], space.mutate(found[-3], rng), rng)
        found.append(space.mutate(child, rng))
    assert found[-1].text == (
        "recipe: weights 0.2 | calibration calibration:1; samples=16; length=256; choose=loss; quantiles=0.5,1; "
        "gradients=backward | metric blend; order=first; magnitude=0.25; activation=2; comparison=layer | "
        "allocation owl; spread=0.04; factor=10 | repair obs"
    )


def test_other_options_are_another_search():
    raw = {"model": "tiny", "space": {"kind": "recipe", "unit": "weights", "schedule": {"steps": [1, 4]}}}
    assert identity(settings_from(raw))["space"]["schedule"]["steps"] == [1, 4]


@pytest.mark.parametrize("controller", ["random", "optuna"])
def test_a_search_counts_the_tokens_of_the_schedules_that_it_chose(controller, tmp_path):
    space = {
        "kind": "recipe",
        "unit": "weights",
        "target": 0.3,
        "samples": [4],
        "length": [32],
        "pool_tokens": 2048,
        "choose": ["random"],
        "subsets": 1,
        "metrics": ["magnitude"],
        "allocations": ["uniform"],
        "repairs": ["none"],
        "known": [],
        "schedule": {"steps": [1, 2], "retrain": [0, 256]},
    }
    raw = {"model": "tiny", "space": space, "evaluator": EVALUATOR, "budget": {"evaluations": 8}}
    texts = []
    for name in ("one", "two"):
        app.search(settings_from({**raw, "controller": {"kind": controller}}), tmp_path / name)
        run = app.open_run(tmp_path / name)
        trials = [t.measurement for t in run.trials() if t.measurement.candidate != "dense"]
        texts.append([m.candidate for m in trials])
    assert texts[0] == texts[1]
    computed = {}
    for m in trials:
        computed[m.candidate] = computed_tokens(Recipe.parse(m.candidate).plain)
        assert m.n_tokens == m.fidelity.n_tokens + computed[m.candidate]
    assert set(computed.values()) == {0, 3 * 256, 3 * 512}
