"""Formulas as candidates: switched like any other, recognised where they prune alike, searched end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.evaluators.session import Session
from secateur.pruners.pruner import InfeasibleError
from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity

EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [128, 512], "test_tokens": 512}
SPACE = {"kind": "formula", "target": 0.6, "terminals": ["W", "G", "X", "H"]}
SMALL, LARGE = Fidelity("search", 128), Fidelity("search", 512)


def settings(**changes):
    raw = {
        "space": SPACE,
        "evaluator": EVALUATOR,
        "objectives": ["loss", "nodes"],
        "budget": {"evaluations": 30},
    }
    controller = {"kind": "evolution", "start": "random", "offspring": 8, "parents": 4, "crossover": 0.5}
    return settings_from({**raw, "controller": controller, **changes})


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    made = Session(plan(settings()))
    made.directory = tmp_path_factory.mktemp("store") / "levels"
    made.build_levels(made.directory)
    return made


@pytest.fixture
def evaluator(session):
    return session.evaluator(session.directory)


def test_wanda_as_a_formula_measures_as_the_metric_does(session, evaluator, tmp_path):
    allocation = {"kind": "allocation", "metric": "wanda", "target": 0.6, "step": 0.2, "max_sparsity": 0.8}
    other = Session(plan(settings(space=allocation, objectives=["loss"])))
    other.build_levels(tmp_path / "levels")
    uniform = other.space.baselines()["uniform@0.6"].text
    [expected] = other.evaluator(tmp_path / "levels").evaluate([uniform], LARGE)
    [found] = evaluator.evaluate(["abs(W) * X"], LARGE)
    assert found.values["kl"] == pytest.approx(expected.values["kl"], rel=1e-6)
    assert found.values["params"] == pytest.approx(expected.values["params"], abs=len(session.prunables))


def test_formulas_that_prune_alike_are_measured_once(evaluator):
    first, second = evaluator.evaluate(["abs(W) * X", "square(W * X)"], SMALL)
    assert first.values["loss"] == second.values["loss"]
    assert second.blocks == 0
    [again] = evaluator.evaluate(["log(abs(W) * X)"], SMALL)
    assert (again.blocks, again.n_tokens) == (0, 0)
    assert again.values["loss"] == first.values["loss"]


@pytest.mark.parametrize("text", ["X", "log(W)", "1 / (W - W)", "3", "sqrt(W) + abs(W)"])
def test_what_gives_no_ranking_is_infeasible_with_a_reason_and_costs_nothing(evaluator, text):
    [found] = evaluator.evaluate([text], SMALL)
    assert found.infeasible is not None
    assert found.infeasible.startswith("Expected")
    assert found.n_tokens == 0


def test_infeasible_and_feasible_ones_come_back_in_order(evaluator):
    texts = ["X", "abs(W)", "log(W)", "abs(W) * X", "square(W) / H"]
    found = evaluator.evaluate(texts, SMALL)
    assert [m.candidate for m in found] == texts
    assert [m.infeasible is None for m in found] == [False, True, False, True, True]


def test_the_model_is_dense_again_afterwards(session, evaluator):
    before = {linear.name: linear.weight.clone() for linear in session.anatomy.linears}
    evaluator.evaluate(["abs(W) * X"], SMALL)
    assert all(torch.equal(linear.weight, before[linear.name]) for linear in session.anatomy.linears)
    [dense] = evaluator.evaluate(["dense"], SMALL)
    assert dense.values["kl"] < 1e-5


def test_a_model_that_undoes_a_formula_names_the_layer(session):
    pruner = session.cases["main"].pruner()
    pruner.open(session.directory)
    with pytest.raises(InfeasibleError, match="Expected finite values"):
        pruner.keys({"metric": "formula: sqrt(W)", "sparsity": {session.prunables[0].name: 0.5}})


@pytest.mark.usefixtures("forked_reload")
def test_a_search_finds_formulas_and_exports_one(tmp_path):
    run = app.run(tmp_path / "run", **settings().model_dump(mode="json"))
    assert {"dense", "wanda@0.6", "magnitude", "pruner-zero", "gblm"} == set(run.baselines)
    best = min(
        (t for t in run.trials() if t.measurement.values["sparsity"] > 0.5),
        key=lambda t: t.measurement.values["loss"],
    )
    assert best.measurement.values["loss"] <= run.baselines["wanda@0.6"].measurement.values["loss"]
    assert best.number in {t.number for t in run.front()}
    exported = run.export(best, tmp_path / "model", calibration="dense")
    searched, again = (exported.measured[f"search:512, as {how}"]["kl"] for how in ("searched", "exported"))
    assert again == pytest.approx(searched, rel=1e-4)


def test_controllers_that_need_slots_refuse(tmp_path):
    for controller in ({"kind": "sensitivity"}, {"kind": "evolution", "start": "sensitivity"}):
        with pytest.raises(UsageError, match="whose slots can be measured alone"):
            app.run(tmp_path / "run", **settings(controller=controller).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"target": 1.0}, "`space.target` to be less than 1, got 1.0"),
        ({"terminals": ["W", "Q"]}, "terminals` out of"),
        ({"known": ["wander"]}, "known` out of"),
        ({"known": ["formula: abs(W) *"]}, "got the end at column 9"),
        ({"size": 2}, "`space.size` to be greater than or equal to 3, got 2"),
        ({"operators": []}, "operators` out of"),
    ],
)
def test_settings_are_checked(space, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        app.run(tmp_path / "run", **{**settings().model_dump(mode="json"), "space": {**SPACE, **space}})


def test_formulas_of_ones_own_are_known():
    known = ["formula: X * abs(W + G)", "wanda"]
    space = Session(plan(settings(space={**SPACE, "terminals": ["W", "G", "X"], "known": known}))).space
    assert [formula.text for formula in space.known.values()] == ["X * abs(W + G)", "abs(W) * X"]
    assert list(space.baselines())[1] == "formula: X * abs(W + G)@0.6"


def test_variation_makes_what_can_be_parsed_and_uses_the_weights():
    space = Session(plan(settings())).space
    rng = np.random.default_rng(0)
    parent = space.baselines()["wanda@0.6"]
    for _ in range(300):
        child = space.mutate(parent, rng)
        assert space.parse(child.text) == child != parent
        parent = space.crossover(child, space.sample(rng, 0), rng)
        assert space.cost(parent)["nodes"] <= 24
