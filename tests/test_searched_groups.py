"""Search over sizes of groups: what is drawn, varied and told, what goes together, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from secateur.pruners.recipes.checks import check_family
from secateur.search import app
from secateur.search.errors import UsageError
from secateur.search.settings.settings import identity, settings_from
from secateur.spaces.recipe.candidate import Recipe
from tests.models import small_anatomy
from tests.recipe_toy import recipe_space

OPTIONS = {"unit": "weights", "target": 0.5, "group_size": [0, 4, 8]}


def sampled(space, n=120):
    rng = np.random.default_rng(0)
    return [space.sample(rng, 0) for _ in range(n)]


def sizes(recipes):
    return {(x.plain["metric"]["name"], x.plain["metric"].get("group_size", 0)) for x in recipes}


def test_groups_are_drawn_and_told_where_the_metric_can_choose_in_them_under_one_share():
    methods = {"metrics": ["wanda", "dsnot", "maskllm"], "allocations": ["uniform", "owl"]}
    found = sampled(recipe_space(**OPTIONS, **methods))
    wanda = {("wanda", size) for size in (0, 4, 8)}
    assert sizes(found) == wanda | {("dsnot", 0), ("maskllm", 0), ("maskllm", 4)}
    rules = {(bool(x.plain["metric"].get("group_size")), x.plain["allocation"]["rule"]) for x in found}
    assert rules == {(True, "uniform"), (False, "uniform"), (False, "owl")}
    for recipe in found:
        size = recipe.plain["metric"].get("group_size", 0)
        assert (f"; group_size={size} |" in recipe.text) == (size > 0)
        assert Recipe.parse(recipe.text) == recipe


def test_blocks_are_not_skipped_beside_groups():
    found = sampled(
        recipe_space(**OPTIONS, metrics=["wanda"], allocations=["uniform"], search=["allocation"])
    )
    skips = {
        (x.plain["metric"].get("group_size", 0) > 0, x.plain["allocation"]["skip_first"] > 0) for x in found
    }
    assert skips == {(True, False), (False, False), (False, True)}


def test_variation_and_parameters_reach_all_sizes():
    space = recipe_space(**OPTIONS, metrics=["wanda", "ria"], search=["metric"])
    rng, first = np.random.default_rng(0), space.known("wanda", 0)
    assert "group_size" not in first.plain["metric"]
    reached = sizes(space.mutate(first, rng) for _ in range(80))
    assert reached >= {("wanda", 4), ("wanda", 8), ("ria", 0)}
    four = space.from_parameters({"metric.name": 0, "metric.group_size": 1}, 0, rng)
    assert four.plain["metric"] == {"name": "wanda", "comparison": "output", "group_size": 4}
    assert space.from_parameters(space.to_parameters(four), 0, rng) == four
    assert sizes(space.crossover(four, first, rng) for _ in range(20)) == {("wanda", 4), ("wanda", 0)}


def test_one_size_is_that_of_all_recipes_that_can_have_it():
    space = recipe_space(
        unit="weights", target=0.5, group_size=[4], search=["repair"], known=["sparsegpt", "owl"]
    )
    found = {
        name: x.plain["metric"].get("group_size", 0)
        for name, x in space.baselines().items()
        if x.text != "dense"
    }
    assert found == {"wanda@0.5": 4, "sparsegpt@0.5": 4, "owl@0.5": 0}
    rng = np.random.default_rng(0)
    assert {x.plain["metric"]["group_size"] for x in sampled(space, 10)} == {4}
    child = space.mutate(space.baselines()["owl@0.5"], rng).plain
    assert (child["metric"]["group_size"], child["allocation"]["rule"]) == (4, "uniform")


def test_without_options_a_run_is_that_of_before():
    plain = settings_from({"space": {"kind": "recipe", "unit": "weights"}})
    assert "group_size" not in identity(plain)["space"]
    asked = settings_from({"space": {"kind": "recipe", **OPTIONS}})
    assert identity(asked)["space"]["group_size"] == [0, 4, 8]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"unit": "structure"}, "Expected `space.group_size` with the unit weights, got structure"),
        ({"group_size": [1]}, "`space.group_size` to be 0 or a whole number >= 2, got 1"),
        ({"group_size": []}, "`space.group_size` to list some, each once"),
        (
            {"target": [0.5, 0.6]},
            "Expected `space.target` to be a whole number of zeros in each 4 weights, .* got 0.6. Take 0.5,",
        ),
        (
            {"metrics": ["dsnot"], "start": "dsnot"},
            "`space.group_size` 0 with the metrics dsnot, got 4",
        ),
        (
            {"allocations": ["owl"], "start": "owl"},
            "`space.allocations` with uniform beside `group_size`",
        ),
    ],
)
def test_what_no_recipe_could_have_is_refused(section, message):
    with pytest.raises(UsageError, match=message):
        settings_from({"space": {"kind": "recipe", **OPTIONS, **section}})


def test_a_size_that_divides_no_rows_is_refused_by_the_model():
    space = settings_from({"space": {"kind": "recipe", **OPTIONS, "target": 0.4, "group_size": [0, 5]}}).space
    with pytest.raises(
        ValueError, match=r"`group_size` to divide the number of inputs, got 5 for 32 at model"
    ):
        check_family(space, small_anatomy())


def test_a_search_measures_patterns_and_is_read_again(tmp_path):
    space = {
        "kind": "recipe",
        **OPTIONS,
        "samples": [4],
        "length": [32],
        "pool_tokens": 2048,
        "choose": ["random"],
        "subsets": 1,
        "metrics": ["magnitude"],
        "allocations": ["uniform"],
        "repairs": ["none"],
        "known": [],
    }
    evaluator = {"window": 32, "calibration_tokens": 64, "fidelities": [64], "test_tokens": 64}
    raw = {"model": "tiny", "space": space, "evaluator": evaluator, "budget": {"evaluations": 8}}
    app.search(settings_from({**raw, "controller": {"kind": "random"}}), tmp_path / "run")
    measured = {t.measurement.candidate: t.measurement for t in app.open_run(tmp_path / "run").trials()}
    losses = {
        Recipe.parse(text).plain["metric"].get("group_size", 0): m.values["loss"]
        for text, m in measured.items()
        if text != "dense"
    }
    assert len(losses) > 1
    assert losses[0] < min(x for size, x in losses.items() if size)
