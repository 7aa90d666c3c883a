from __future__ import annotations

import gc
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from secateur.search.controller import Trial
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UsageError
from secateur.search.mirror.optuna_copy import OptunaCopy
from secateur.search.mirror.storages import storage_of
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity
from secateur.spaces.recipe.build import build_recipe
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.recipe.settings import RecipeSettings
from secateur.spaces.shape import ModelShape
from tests.recipe_toy import LINEARS, Landscape, recipe_space
from tests.toy import start

FIDELITIES = tuple(Fidelity("search", n_tokens) for n_tokens in (64, 256, 1024))


# --- the space ---


def sections(recipe: Recipe) -> dict[str, str]:
    """But for what calibration data have to do with the metric."""
    parts = recipe.text.replace("; gradients=backward", "").split(" | ")
    return {part.partition(" ")[0]: part for part in parts}


def active(recipe: Recipe) -> set[str]:
    return {
        f"{section}.{key}" for section, held in recipe.plain.items() if isinstance(held, dict) for key in held
    }


def test_what_is_not_searched_is_as_in_the_start():
    space = recipe_space(search=["calibration"], start="numerical", target=[0.2, 0.4])
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = space.sample(rng, 1)
        assert found.plain["metric"] == {"name": "numerical"}
        assert found.plain["allocation"] == {"rule": "global", "normalise": "mask", "cost": 1}
        assert found.plain["repair"] == "obs"
        assert found.sparsity == 0.4
    assert {p.name.partition(".")[0] for p in space.parameters()} == {"calibration"}


@pytest.mark.parametrize("name", KNOWN)
def test_every_published_recipe_can_be_searched_from(name):
    space = recipe_space(unit=KNOWN[name].unit, start=name)
    recipe, rng = space.known(name, 0), np.random.default_rng(0)
    assert space.from_parameters(space.to_parameters(recipe), 0, rng) == recipe
    few = recipe_space(unit="weights", start="gblm", metrics=["wanda"], repairs=["obs"])
    assert {few.sample(rng, 0).plain["metric"]["name"] for _ in range(20)} == {"wanda"}


def test_parameters_apply_where_their_parents_say_so():
    space, rng = recipe_space(), np.random.default_rng(1)
    seen: set[frozenset[str]] = set()
    for _ in range(200):
        keys_of = active(recipe := space.sample(rng, 0))
        metric, choose = recipe.plain["metric"], recipe.plain["calibration"]["choose"]
        assert ("metric.order" in keys_of) == (metric["name"] == "blend")
        assert ("metric.angle" in keys_of) == (metric.get("order") == "mixed")
        assert ("metric.weights" in keys_of) == (metric.get("reduce", "output") != "output")
        assert ("calibration.clusters" in keys_of) == (choose == "clusters")
        assert ("allocation.gamma" in keys_of) == (recipe.plain["allocation"]["rule"] == "nirvana")
        names = space.to_parameters(recipe)
        assert ("metric.angle" in names) == ("metric.angle" in keys_of)
        seen.add(frozenset(names))
    assert len(seen) > 20


def test_a_choice_that_can_never_apply_is_no_parameter():
    names = {p.name for p in recipe_space(metrics=["flap", "cfsp"]).parameters()}
    assert not any(name.startswith("metric.") and name != "metric.name" for name in names)
    fixed = recipe_space(search=["calibration"], gradients=["backward", "forward"])
    assert "calibration.gradients" not in {p.name for p in fixed.parameters()}
    signed = recipe_space(search=["calibration"], gradients=["backward", "forward"], start="llm_pruner_first")
    assert "calibration.gradients" in {p.name for p in signed.parameters()}


def test_a_mutation_changes_one_or_two_choices():
    space, rng = recipe_space(sources={"a": "docs", "b": "x"}), np.random.default_rng(0)
    recipe = space.sample(rng, 0)
    for _ in range(100):
        child = space.mutate(recipe, rng)
        before, after = space.to_parameters(recipe), space.to_parameters(child)
        changed = [name for name in before.keys() & after.keys() if before[name] != after[name]]
        # A mixture in lowest terms may change the weights of both sources at once.
        assert 1 <= len({re.sub(r"sources\..*", "sources", name) for name in changed}) <= 2
        recipe = child


def test_a_crossover_takes_each_part_from_one_parent():
    space, rng = recipe_space(target=[0.2, 0.5]), np.random.default_rng(0)
    taken = {name: set() for name in ("calibration", "metric", "allocation", "repair")}
    for _ in range(60):
        first, second = space.sample(rng, 0), space.sample(rng, 1)
        child = space.crossover(first, second, rng)
        assert child.sparsity == 0.2
        for name in taken:
            of = [sections(parent)[name] == sections(child)[name] for parent in (first, second)]
            assert any(of)
            taken[name] |= {tuple(of)}
    assert all({(True, False), (False, True)} <= found for found in taken.values())


def test_known_recipes_off_the_tree_keep_their_values():
    space = recipe_space(unit="weights", known=["owl", "magnitude"], metrics=["blend"], search=["metric"])
    owl = space.baselines()["owl@0.2"]
    assert owl.plain["allocation"] == {"rule": "owl", "spread": 0.08, "factor": 5}
    assert "metric.name" not in space.to_parameters(owl)
    child = space.mutate(owl, np.random.default_rng(0))
    assert child.plain["allocation"] == owl.plain["allocation"]
    assert space.parse(owl.text) == owl


def test_the_dense_model_is_the_start_at_no_sparsity():
    space = recipe_space(unit="blocks", target=0.25)
    dense = space.baselines()["dense"]
    start = space.config(space.baselines()["shortgpt@0.25"])
    assert space.config(dense) == {**start, "sparsity": 0}
    assert space.to_parameters(dense) == {}


def test_costs_are_those_of_the_target():
    weights = recipe_space(unit="weights", target=0.5).baselines()
    assert recipe_space(unit="weights").cost(weights["wanda@0.5"])["params"] == 100_000 - 8 * 320
    space = recipe_space(target=0.25)
    block = 4 * 200 + 20 + 48 * 30 + 20
    cost = space.cost(space.baselines()["wanda_sp@0.25"])
    assert cost["params"] == pytest.approx(100_000 - 0.25 * 2 * block)
    assert cost["sparsity"] == 0.25
    assert cost["kv_bytes"] == pytest.approx(256 - 0.25 * 2 * 4 * 16)


def test_recipes_of_equal_calibration_are_neighbours():
    space, rng = (
        recipe_space(samples=[8, 16], length=[64], choose=["random"], subsets=2),
        np.random.default_rng(0),
    )
    recipes = sorted((space.sample(rng, 0) for _ in range(40)), key=space.locality_key)
    used = [sections(recipe)["calibration"] for recipe in recipes]
    assert sum(a != b for a, b in pairwise(used)) == len(set(used)) - 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"unit": "heads"}, "space.unit"),
        ({"target": 0}, r"within \(0, 1\), got 0"),
        ({"samples": []}, "Expected `space.samples` to list some, each once"),
        ({"samples": [16, 8]}, "`space.samples` to ascend"),
        ({"quantiles": [[0.5, 0.2]]}, "the first below the second"),
        ({"pool_tokens": 100}, "`space.pool_tokens` for 8 samples of 256 tokens, got 100"),
        ({"length": [64, 8192]}, "`space.pool_tokens` for 8 samples of 8192 tokens, got 32768"),
        ({"samples": [8, 1024]}, "`space.pool_tokens` for 1024 samples of 64 tokens, got 32768"),
        ({"repairs": ["laco"]}, "`space.repairs` of structure out of none, bias.*got 'laco'"),
        ({"unit": "weights", "repairs": ["refit"]}, "`space.repairs` of weights"),
        ({"allocations": ["owl"]}, "`space.allocations` of structure out of uniform.*got 'owl'"),
        ({"unit": "blocks", "allocations": ["uniform"]}, "out of none, got 'uniform'"),
        (
            {"allocations": ["uniform", "prefix"]},
            "Expected `space.profile`, the file that the rule prefix follows",
        ),
        ({"start": "wanda"}, "`space.start` of structure out of wanda_sp.*got 'wanda'"),
        ({"known": ["flop"]}, "`space.known` of structure.*got 'flop'"),
        ({"unit": "weights", "metrics": [{"formula": "abs(W"}]}, "metrics"),
        ({"dampening": 0}, "Expected `space.dampening` to be greater than 0, got 0"),
        ({"length": [48, 64]}, "`space.length` in multiples of 32 with `choose: loss`, got 48"),
        ({"sources": {"my text": "docs"}}, "names in `space.sources` of letters.*got 'my text'"),
        (
            {"gradients": ["forward"], "metrics": ["llm_pruner_second"]},
            "one of `space.metrics` that takes signed gradients .* with `gradients: forward`, got llm_pruner_second",
        ),
        ({"metric": "flap"}, "got 'metric'"),
        (
            {"start": "pat", "search": ["calibration"], "protect": ["*.o_proj"]},
            r"no `space.protect` with the metric pat, which cuts through all layers, got \*\.o_proj\. Leave it out",
        ),
        ({"metrics": ["wanda_sp", "pat"], "protect": ["*.o_proj"]}, "no `space.protect` with the metric pat"),
        (
            {"start": "sheared_1_3b", "protect": ["*.o_proj"]},
            "no `space.protect` with `blocks` of the metric sheared, .* or leave `blocks` at its default",
        ),
        ({"schedule": {}}, "Expected options for a key of `space.schedule`, got none"),
        ({"schedule": {"steps": [8, 1]}}, r"Expected `space.schedule.steps` to ascend, got \[8, 1\]"),
        ({"schedule": {"loss": ["kl", "kl"]}}, "`space.schedule.loss` to list some, each once"),
        (
            {"schedule": {"shape": ["square"]}},
            "`space.schedule.shape` to be one of linear, cubic, got 'square'",
        ),
        ({"schedule": {"retrain": [0, -1]}}, r"`space.schedule.retrain` to be a whole number within \[0, "),
        ({"schedule": {"rounds": [1]}}, "got 'rounds'"),
        (
            {"unit": "weights", "proxy": {}, "schedule": {"after": [0, 4096]}},
            "no `space.proxy` with a `schedule` that trains",
        ),
        (
            {"unit": "weights", "proxy": {}, "metrics": ["wanda", "maskllm"]},
            "no `space.proxy` with the metric maskllm that trains",
        ),
        (
            {"unit": "weights", "proxy": {}, "start": "besa", "search": ["calibration"]},
            "no `space.proxy` with the rule besa that trains",
        ),
        (
            {"unit": "weights", "schedule": {"step": [0.1]}},
            "`space.schedule` without `step` for recipes of weights",
        ),
        (
            {"unit": "experts", "schedule": {"steps": [1, 2]}},
            "`space.schedule` without `steps` for recipes of experts",
        ),
    ],
)
def test_settings_are_checked(section, message):
    with pytest.raises(UsageError, match=message):
        settings_from({"space": {"kind": "recipe", **section}})


def test_formulas_may_be_choices():
    space = recipe_space(unit="weights", metrics=["blend", "formula: abs(W)*X"], search=["metric"])
    rng = np.random.default_rng(0)
    names = {space.sample(rng, 0).plain["metric"]["name"] for _ in range(30)}
    assert names == {"blend", "formula: abs(W) * X"}


def test_beside_protected_linears_nothing_that_goes_through_all_layers_is_a_choice():
    asked = {"metrics": ["wanda_sp", "sheared"], "search": ["metric"]}
    paths = {"metric.blocks", "metric.hidden"}
    assert {c.path for c in recipe_space(**asked).choices} == {"metric.name", *paths}
    held = recipe_space(**asked, protect=["*.o_proj"])
    assert {c.path for c in held.choices} == {"metric.name"}
    rng = np.random.default_rng(0)
    metrics = [held.sample(rng, 0).plain["metric"] for _ in range(8)]
    assert {"name": "sheared"} in metrics


def test_a_model_without_counted_blocks_is_refused():
    shape = ModelShape(1000, 2, 900, 10)
    with pytest.raises(ValueError, match="known block shapes for recipes of structure"):
        build_recipe(RecipeSettings(), LINEARS, shape)
    assert build_recipe(RecipeSettings(unit="weights"), LINEARS, shape).targets == (0.2,)


# --- controllers ---


def test_evolution_halves_recipes_over_fidelities():
    space = recipe_space(search=["metric", "repair"])
    landscape = Landscape(space, 3)
    controller = Evolution(space, FIDELITIES, 0, EvolutionSettings(offspring=8, parents=2))
    losses: list[float] = []
    fidelities: list[Any] = []
    for number in range(200):
        (proposal,) = controller.ask(1)
        measured = landscape.measure(proposal)
        controller.tell([Trial(number, measured)])
        fidelities.append(proposal.fidelity)
        if proposal.fidelity == FIDELITIES[-1]:
            losses.append(measured.values["loss"])
    assert fidelities.count(FIDELITIES[0]) > 4 * fidelities.count(FIDELITIES[-1])
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", ["sensitivity", "greedy", "genetic"])
def test_controllers_for_other_spaces_say_so(kind):
    row = CONTROLLERS[kind]
    with pytest.raises(ValueError, match="Expected a space"):
        row.build(recipe_space(), FIDELITIES, 0, row.settings(kind=kind))


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_optunas_tools_see_the_parameters_that_apply(kind, tmp_path):
    space = recipe_space()
    rng, largest = np.random.default_rng(0), FIDELITIES[-1]
    landscape = Landscape(space)
    recipes = [*space.baselines().values(), *(space.sample(rng, 0) for _ in range(8))]
    storage = storage_of(tmp_path, None if kind == "journal" else f"sqlite:///{tmp_path / 'shared.db'}")
    with start(tmp_path / "run") as study:
        study.append([landscape(recipe, largest) for recipe in recipes])
        copy = OptunaCopy(study, space, ("loss",), largest, storage)
        copy.catch_up()
        found = storage.load().get_trials()
        copy.close()
    gc.collect()
    assert [trial.params for trial in found] == [space.to_parameters(recipe) for recipe in recipes]
    assert found[0].params == {}  # the dense model's
