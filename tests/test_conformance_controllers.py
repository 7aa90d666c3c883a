"""What every controller keeps to, run over the registry: a new row is tested by what is here."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from secateur.search.controller import Controller, Trial
from secateur.search.controllers.optuna.controller import Optuna
from secateur.search.controllers.registry import CONTROLLERS
from secateur.spaces.allocation.space import AllocationSpace
from secateur.spaces.formulas.space import Formula
from secateur.spaces.measurement import Effects, Fidelity, Measurement
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.shape import ModelShape, Unit
from secateur.spaces.space import Space
from tests.formula_toy import FormulaLandscape, formula_space
from tests.recipe_toy import Landscape, recipe_space

SHAPE = ModelShape(n_params=10_000, bytes_per_param=2, macs_per_token=10_000, kv_bytes_per_token=10)
FIDELITIES = tuple(Fidelity("search", n_tokens) for n_tokens in (64, 256, 1024))

# For each row of the registry the settings that it is tested with.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "uniform": [{}],
    "random": [{}],
    "evolution": [
        {},
        {"parents": 3, "offspring": 6, "survivors": [3, 2]},
        {"start": "random", "offspring": 5},
        {"start": "sensitivity", "sensitivity": {"levels": [0.5]}},
        {"start": "sensitivity", "sensitivity": {"by": "curvature"}},
        {"start": "trust_region"},
        {"guided": 4, "offspring": 5},
        {"guided": 3, "start": "trust_region"},
        {"start": "greedy"},
    ],
    "greedy": [{}, {"moves": "block", "n_tokens": 256}],
    "genetic": [
        {"islands": 1},
        {"islands": 3, "migrate_every": 1, "constants": {"every": 1, "steps": 2}},
        {"seeds": False, "parsimony": 0, "constants": None},
    ],
    "sensitivity": [
        {},
        {"levels": [0.4, 0.6], "n_tokens": 256},
        {"around": "uniform"},
        {"by": "curvature"},
        {"by": "curvature", "around": "uniform", "n_tokens": 512},
    ],
    "trust_region": [{}, {"radius": 1, "n_tokens": 64}],
    "learned": [{}, {"steps": 3, "samples": 3, "every": 1, "n_tokens": 64}],
    "surrogate": [
        {},
        {"offspring": 6, "survivors": [3, 2]},
        {"prior": "sensitivity", "sensitivity": {"levels": [0.5]}, "offspring": 5},
        {"prior": "sensitivity", "sensitivity": {"by": "curvature"}, "offspring": 5},
    ],
    "optuna": [  # gp takes a second a proposal: see test_optuna_controller.py
        {},
        {"sampler": "nsga2", "options": {"population_size": 8}, "start": 2},
        {"sampler": "nsga3", "options": {"population_size": 8}, "objectives": ["loss", "sparsity"]},
        {"sampler": "tpe", "objectives": ["loss", "sparsity"], "start": 0},
        {"sampler": "cmaes", "start": 0},
        {"sampler": "random"},
        {"sampler": "optuna.samplers.QMCSampler"},
    ],
}
# The others use whatever they know by then, so that it matters what was told between two asks.
INDEPENDENT_OF_TIMES = {"uniform", "random", "greedy", "sensitivity", "trust_region", "learned"}
# The others always have something else to try.
WAITING = {"uniform", "greedy", "sensitivity", "trust_region", "learned"}
# The others search any space.
OF_FORMULAS = {"genetic"}


class OfRecipes(dict[str, Any]):
    """Settings that are tested on a space whose parameters apply under conditions."""


RECIPES = [
    ("random", OfRecipes()),
    ("evolution", OfRecipes(parents=3, crossover=0.5)),
    ("optuna", OfRecipes()),
    ("optuna", OfRecipes(sampler="nsga2", options={"population_size": 8}, objectives=["loss", "sparsity"])),
    ("optuna", OfRecipes(sampler="cmaes", start=2)),
]
CASES: list[Any] = [*((kind, settings) for kind in CONTROLLERS for settings in SETTINGS[kind]), *RECIPES]


LANDSCAPE = FormulaLandscape()
RECIPE_LANDSCAPE = Landscape(recipe_space(unit="weights", search=["metric", "allocation", "repair"]))
SMALLEST = {
    "terminals": ("W",),
    "operators": ("abs",),
    "constants": 0,
    "depth": 2,
    "size": 3,
    "known": ("magnitude",),
}


def space_of(case: Any, n_units: int = 9, targets: tuple[float, ...] = (0.4, 0.6)) -> Space[Any]:
    if isinstance(case[1], OfRecipes):
        search = ["metric", "allocation", "repair"] if n_units > 1 else ["repair"]
        repairs = ["none", "obs"] if n_units > 1 else ["none"]
        return recipe_space(unit="weights", target=list(targets), search=search, repairs=repairs, known=[])
    if case[0] in OF_FORMULAS:
        return formula_space() if n_units > 1 else formula_space(**SMALLEST)
    units = [Unit(f"u{i}", (40 * (1 + i % 3),), i, (f"u{i}",)) for i in range(n_units)]
    return AllocationSpace(units, (), (0, 0.2, 0.4, 0.6, 0.8), targets, SHAPE)


def build(case: tuple[str, dict[str, Any]], space: Space[Any], seed: int = 0) -> Controller:
    kind, settings = case
    row = CONTROLLERS[kind]
    return row.build(space, FIDELITIES, seed, row.settings(kind=kind, **settings))


def measure(proposal) -> Measurement:
    """A loss that needs the order of units, with a little less at less data; some candidates are infeasible."""
    if isinstance(proposal.candidate, Formula):
        return LANDSCAPE.measure(proposal)
    if isinstance(proposal.candidate, Recipe):
        return RECIPE_LANDSCAPE.measure(proposal)
    levels = proposal.candidate.levels
    if levels[:2] == (4, 4):
        return Measurement(proposal.candidate.text, proposal.fidelity, infeasible="too sparse at the start")
    loss = sum(level**2 / (1 + unit) for unit, level in enumerate(levels))
    values = {"loss": loss - 1 / proposal.fidelity.n_tokens, "sparsity": sum(levels) / 5 / len(levels)}
    effects = effects_of(levels) if proposal.fidelity.part == "gradient" else None
    return Measurement(proposal.candidate.text, proposal.fidelity, values, effects=effects)


def effects_of(levels: tuple[int, ...]) -> Effects:
    """Exact ones of the loss that `measure` has."""
    at = list(enumerate(levels))
    first = tuple(tuple(2 * own * (o - own) / (1 + unit) for o in range(5)) for unit, own in at)
    second = tuple(tuple((o - own) ** 2 / (1 + unit) for o in range(5)) for unit, own in at)
    return Effects(first, second)


def run(controller: Controller, n: int, *, limit: int = 200, shuffle: bool = False) -> list[tuple[str, str]]:
    """Keys of the proposals, in order; results come back some rounds late, in another order if asked for."""
    limit = min(limit, 40) if isinstance(controller, Optuna) else limit  # which costs more a proposal
    keys: list[tuple[str, str]] = []
    under_way: list[Any] = []
    while len(keys) < limit:
        proposals = controller.ask(n)
        assert len(proposals) <= n
        keys += [proposal.key for proposal in proposals]
        if not proposals and not under_way:
            break
        if not proposals or len(under_way) > 2 * n:
            if shuffle:
                random.Random(len(keys)).shuffle(under_way)
            controller.tell([Trial(len(keys) + i, measure(proposal)) for i, proposal in enumerate(under_way)])
            under_way = []
        under_way += proposals
    return keys[:limit]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param


def test_rows_are_described():
    for row in CONTROLLERS.values():
        assert row.summary
        assert row.source == "" or row.source.startswith("https://")


def test_nothing_is_proposed_twice_and_all_of_it_is_in_the_space(case):
    space = space_of(case)
    keys = run(build(case, space), 5)
    assert len(set(keys)) == len(keys) > 0
    for text, fidelity in keys:
        assert space.parse(text).text == text
        known = CONTROLLERS[case[0]].curvature(CONTROLLERS[case[0]].settings(**case[1]), FIDELITIES)
        found = Fidelity.parse(fidelity)
        assert found in FIDELITIES or (known is not None and found.part == "gradient")


def test_same_seed_same_calls_same_proposals(case):
    for shuffle in (False, True):
        first = run(build(case, space_of(case)), 5, shuffle=shuffle)
        assert run(build(case, space_of(case)), 5, shuffle=shuffle) == first


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in INDEPENDENT_OF_TIMES], ids=str)
def test_same_proposals_however_many_are_asked_for_in_whatever_order_results_come(case):
    first = run(build(case, space_of(case)), 5)
    assert run(build(case, space_of(case)), 1) == first
    assert run(build(case, space_of(case)), 1000) == first
    assert run(build(case, space_of(case)), 5, shuffle=True) == first


def test_targets_all_get_their_share(case):
    space = space_of(case)
    largest = FIDELITIES[-1].text
    met = [
        space.target_of(space.parse(text))
        for text, fidelity in run(build(case, space), 5)
        if fidelity == largest
    ]
    assert set(range(len(space.targets))) <= set(met)


def test_asking_alone_ends_in_waiting(case):
    kind, _ = case
    controller = build(case, space_of(case, 12, (0.4,)))
    asked = [controller.ask(1) for _ in range(300)]
    if kind in WAITING:
        assert asked[-1] == []
    assert all(len(proposals) <= 1 for proposals in asked)
    assert asked[0]


def test_a_space_without_choice_is_finished(case):
    controller = build(case, space_of(case, 1, (0.4,)))
    keys = run(controller, 4)
    assert len(keys) < 300
    assert controller.ask(1) == []


def test_results_that_were_not_asked_for_are_no_trouble(case):
    space = space_of(case)
    controller, plain = build(case, space), build(case, space)
    baselines = [Measurement(c.text, FIDELITIES[-1], {"loss": 1.0}) for c in space.baselines().values()]
    controller.tell([Trial(number, m) for number, m in enumerate(baselines)])
    assert run(controller, 5) == run(plain, 5)


def test_needs_are_counted_before(case):
    controller = build(case, space_of(case))
    assert controller.n_measurements <= len(run(build(case, space_of(case)), 5))


def test_fidelities_are_checked(case):
    kind, settings = case
    row = CONTROLLERS[kind]
    for bad in ((), FIDELITIES[::-1], (Fidelity("test", 64),)):
        with pytest.raises(ValueError, match="Expected `fidelities`"):
            row.build(space_of(case), bad, 0, row.settings(kind=kind, **settings))


def test_another_seed_searches_elsewhere():
    for case in CASES:
        if case[0] in {"random", "evolution", "genetic", "surrogate", "optuna"}:
            assert run(build(case, space_of(case), 0), 5) != run(build(case, space_of(case), 1), 5)


def test_global_generators_are_left_alone(case):
    before = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002  # to see that nobody uses it
    run(build(case, space_of(case)), 5, limit=60)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # noqa: NPY002
