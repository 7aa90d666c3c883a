"""Architectures as candidates: exact costs, cuts that are measured as they are exported, and the whole way."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from secateur.evaluators.session import Session
from secateur.evaluators.trained import own_modules
from secateur.evaluators.training.settings import Training
from secateur.evaluators.training.trainer import Trainer
from secateur.pruners.export.manifest import MANIFEST
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.shape import fixed_macs, model_shape
from secateur.pruners.structure.pruning import prune_structure
from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.errors import UsageError
from secateur.search.results.pick import parse_bounds
from secateur.search.settings.settings import settings_from
from secateur.search.show.report import write_report
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.architecture.cost import cost
from secateur.spaces.measurement import Fidelity
from secateur.spaces.methods import CUT_REPAIRS
from secateur.spaces.shape import BlockShape, ModelShape
from tests.models import random_tokens
from tests.test_families import CASES, build

EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [128, 256], "test_tokens": 256}
SPACE = {"kind": "architecture", "target": 0.3, "repair": ["none", "obs"], "statistics": "dense"}
SMALL, LARGE = Fidelity("search", 128), Fidelity("search", 256)
TRAINED = Fidelity("search", 256, 128)
CUTS = [Kept(1, 17), Kept(0, 48)], [Kept(2, 48), Kept(1, 0)], [Kept(1, 30), Kept(0, 0)]


def settings(**changes):
    raw = {"space": SPACE, "evaluator": EVALUATOR, "budget": {"evaluations": 14}}
    return settings_from({**raw, "controller": {"kind": "evolution", "offspring": 4}, **changes})


# --- costs ---


@pytest.mark.parametrize("family", CASES)
def test_costs_are_those_of_the_cut_model(family):
    context = 5
    for cut, repair in zip(CUTS, ("bias", "none", "liar"), strict=True):
        anatomy = dissect(build(CASES[family][0]))
        shape = model_shape(anatomy, context, 4)
        costs = cost(shape, cut, repair)
        tokens = random_tokens(2, 8)
        prune_structure(
            anatomy,
            list(cut),
            importance="magnitude",
            repair=repair,
            tokens=tokens,
            sequential=False,
        )
        gone = [anatomy.blocks[i].module for i, kept in enumerate(cut) if not any(kept.units)]
        norms = sum(
            p.numel() for block in gone for p in block.parameters()
        )  # of the stream, left out of exports
        assert norms == 0 or family == "opt-projected"
        assert costs["params"] == n_params(anatomy) - norms
        heads = [
            kept.kv_groups * block.n_heads // block.n_kv_heads
            for kept, block in zip(cut, anatomy.blocks, strict=True)
        ]
        scores = [
            2 * n * block.head_dim * block.attended(context)
            for n, block in zip(heads, anatomy.blocks, strict=True)
        ]
        n_weights = sum(linear.n_weights for linear in anatomy.linears)
        assert costs["macs"] == n_weights + fixed_macs(anatomy) + sum(scores)
        n_groups = sum(kept.kv_groups for kept in cut)
        assert costs["kv_bytes"] == 2 * 4 * n_groups * anatomy.blocks[0].head_dim


def test_the_repairs_that_add_biases_are_known_to_the_space():
    shape = ModelShape(
        10_000, 2, 10_000, 1_000, blocks=(BlockShape(4, 70, 7, 24, 10, 3, 90, 10, 4, 5, 5),) * 2
    )
    costs = {name: cost(shape, [Kept(2, 20)] * 2, name)["params"] for name in CUT_REPAIRS}
    assert {name for name, params in costs.items() if params > costs["none"]} == {"bias", "liar"}


# --- measuring ---


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    return tmp_path_factory.mktemp("structure") / "levels"


@pytest.fixture(scope="module")
def session(levels) -> Session:
    made = Session(plan(settings()))
    made.build_levels(levels)
    return made


@pytest.fixture(scope="module")
def candidates(session):
    rng = np.random.default_rng(0)
    found = [session.space.baselines()["uniform@0.3"], *(session.space.sample(rng, 0) for _ in range(3))]
    assert {c.repair for c in found} == {"none", "obs"}
    return [c.text for c in found]


@pytest.fixture(scope="module")
def measured(session, levels, candidates):
    return session.evaluator(levels).evaluate(candidates, LARGE)


def n_params(anatomy):
    return sum(p.numel() for p in anatomy.model.parameters())


def test_an_export_from_dense_statistics_has_the_weights_that_were_measured(candidates, measured):
    at = next(i for i, text in enumerate(candidates) if "obs" in text)
    fresh = Session(plan(settings()))
    data = fresh.data()
    data.of(LARGE)
    fresh.pruner.prune(fresh.space.config(fresh.space.parse(candidates[at])), sequential=False)
    live, values = data.live_losses(LARGE), measured[at].values
    assert live == {name: pytest.approx(values[name], rel=1e-4) for name in live}
    assert values["params"] == n_params(fresh.anatomy)
    assert len(fresh.pruner.units) == len(fresh.anatomy.blocks)


def test_switching_leaves_the_dense_model_and_its_neighbours_alone(session, levels, candidates, measured):
    before = {name: (p.data_ptr(), p.shape) for name, p in session.anatomy.model.named_parameters()}
    evaluator, dense = session.evaluator(levels), session.space.baselines()["dense"].text
    together = evaluator.evaluate([*reversed(candidates), dense], LARGE)
    assert {m.candidate: m.values for m in together[:-1]} == {m.candidate: m.values for m in measured}
    assert together[-1].values["kl"] < 1e-5
    assert {name: (p.data_ptr(), p.shape) for name, p in session.anatomy.model.named_parameters()} == before
    assert sum(m.blocks_saved for m in together) > 0


def test_known_allocations_are_baselines_once_the_store_is_built(session):
    names = set(session.space.baselines())
    assert {"dense", "uniform@0.3"} < names
    assert names & {"flap@0.3", "shortgpt@0.3"}
    assert all(
        session.space.target_of(c) == 0 for name, c in session.space.baselines().items() if name != "dense"
    )


@pytest.mark.parametrize("learn", ["full", "norms", "lora"])
def test_candidates_train_lightly_and_leave_no_trace(session, levels, candidates, measured, learn):
    if learn == "lora":
        pytest.importorskip("peft")
    training = Training(method=learn, tokens=128, batch=1, schedule="constant")
    case = replace(session.cases["main"], plan=replace(session.plan, training=training))
    evaluator = case.evaluator(session.data(), levels, session.training_windows())
    (before,) = evaluator.evaluate([GONE], SMALL)
    first, second = evaluator.evaluate([candidates[1], GONE], TRAINED)
    assert first.values["kl"] != measured[1].values["kl"]
    assert 0 < second.values["kl"] < before.values["kl"]
    assert evaluator.evaluate(candidates[:2], LARGE)[1].values == measured[1].values


GONE = "architecture:2/384,0/192,2/0,2/384x2,0/0;repair=none"


def test_a_cut_model_of_its_own_trains_at_its_own_size(session, levels):
    pruner = session.cases["main"].pruner()
    pruner.open(levels)
    candidate = session.space.parse(GONE)
    for block, key in enumerate(pruner.keys(session.space.config(candidate))):
        pruner.apply(block, key)
    mine = own_modules(session.anatomy)
    pruner.restore()
    params = session.space.cost(candidate)["params"]
    assert n_params(mine) == params < n_params(session.anatomy)
    trainer = Trainer(
        mine, Training(method="full", tokens=256, batch=1), session.training_windows(), session.anatomy
    )
    assert trainer.n_learning == params
    before = {name: p.clone() for name, p in mine.model.named_parameters()}
    trainer.train(2)
    assert trainer.failure is None
    changed = [bool((p != before[name]).any()) for name, p in mine.model.named_parameters() if p.numel()]
    assert np.mean(changed) > 0.9


# --- the whole way ---


@pytest.fixture(scope="module")
def searched(tmp_path_factory, session, levels):
    """One run a controller, over one store."""
    made = {}
    for kind, controller in CONTROLLERS.items():
        made[kind] = tmp_path_factory.mktemp("runs") / kind
        changes = {"controller": {"kind": kind, **controller}, "objectives": ["loss", "params", "kv_bytes"]}
        app.search(settings(**changes), made[kind], levels=levels)
    return made


CONTROLLERS = {
    "evolution": {"offspring": 4},
    "sensitivity": {},
    "greedy": {},
}


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_controllers_run_on_the_space_unchanged(searched, kind):
    run = app.open_run(searched[kind])
    assert run.structured
    assert {"dense", "uniform@0.3"} <= set(run.baselines)
    dense = run.baselines["dense"].measurement.values
    smaller = [t for t in run.trials() if t.measurement.values["params"] < dense["params"]]
    assert smaller
    assert all(t.measurement.values["kl"] > 0 for t in smaller)


@pytest.mark.usefixtures("forked_reload")
def test_pick_report_and_export(searched, tmp_path):
    run = app.open_run(searched["evolution"])
    trial = run.pick(parse_bounds({"max-params": "0.9x"}))
    values = trial.measurement.values
    page, *pictures = write_report(run, trial)
    assert "really smaller" in page.read_text()
    assert all(picture.stat().st_size > 5000 for picture in pictures)
    shares = run.allocation(trial)
    removed = sum(shares[x["name"]] * x["n_weights"] for x in run.study.about.facts["shape"]["linears"])
    dense = run.baselines["dense"].measurement.values
    assert removed == pytest.approx(dense["params"] - values["params"], rel=0.01)
    summary = app.export(searched["evolution"], trial, tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert manifest["parameters"] == {"parent": dense["params"], "saved": values["params"]}
    assert "structured" in summary.label
    (exported,) = (m for text, m in summary.measured.items() if text == "search:256, as exported")
    assert exported["kl"] == pytest.approx(values["kl"], rel=1e-3)  # dense statistics, as in the search


# --- what does not fit ---


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"importance": "wandb"}, "wandb"),
        ({"target": 0.999}, "`target` from"),
        ({"protect": [17]}, "`protect`"),
        ({"of": "latency_decode"}, "secateur latency"),
    ],
)
def test_settings_that_do_not_fit_are_wrong_use(space, said):
    with pytest.raises(UsageError) as error:
        app.open_session(settings(space={**SPACE, **space}))
    assert said in str(error.value)
