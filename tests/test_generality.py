"""One formula on several models, sparsities and patterns: what the loss is, how it is measured, what is kept."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateur.evaluators.cases import MAIN, GeneralEvaluator, cases_of, in_general
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.session import Session
from secateur.evaluators.worker_setup import worker_setup
from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.errors import UsageError
from secateur.search.results.run import open_run
from secateur.search.settings.settings import identity, settings_from
from secateur.search.show.front_table import caption
from secateur.search.show.report import write_report
from secateur.spaces.measurement import Fidelity, Measurement
from tests.models import random_tokens, small_llama

SMALL, LARGE, TEST = Fidelity("search", 64), Fidelity("search", 256), Fidelity("test", 64)
WANDA, MAGNITUDE = "abs(W) * X", "abs(W)"


class Fixed(Evaluator):
    """Losses from a table; None is infeasible."""

    def __init__(self, losses):
        self.losses, self.asked = losses, []

    def evaluate(self, candidates, fidelity):
        self.asked += candidates
        return [
            Measurement(text, fidelity, infeasible="Expected finite values, got log(-1).")
            if self.losses[text] is None
            else Measurement(
                text, fidelity, {"loss": self.losses[text], "kl": 1.0}, n_tokens=64, seconds=0.5, blocks=2
            )
            for text in candidates
        ]


def general(**tables):
    return GeneralEvaluator({name: Fixed(table) for name, table in tables.items()}, "r")


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_geometric_mean_of_ratios_to_the_reference():
    [found] = general(main={"r": 2.0, "a": 1.0}, other={"r": 100.0, "a": 200.0}).evaluate(["a"], SMALL)
    assert found.values["loss"] == pytest.approx(math.sqrt(1 / 2 * 200 / 100))
    assert (found.values["loss:main"], found.values["loss:other"]) == (1.0, 200.0)
    assert found.values["kl"] == 1.0
    assert (found.n_tokens, found.seconds, found.blocks) == (128, 1.0, 4)


def test_no_case_decides_by_its_scale_and_no_order_depends_on_the_reference():
    easy, hard = {"r": 1.0, "a": 0.5, "b": 1.0}, {"r": 1000.0, "a": 1200.0, "b": 900.0}
    first = [m.values["loss"] for m in general(main=easy, hard=hard).evaluate(["a", "b"], SMALL)]
    assert first[0] < first[1]
    easy["r"], hard["r"] = 7.0, 3.0
    again = [m.values["loss"] for m in general(main=easy, hard=hard).evaluate(["a", "b"], SMALL)]
    assert again[0] / again[1] == pytest.approx(first[0] / first[1])


def test_the_reference_has_loss_1_and_the_dense_model_0():
    evaluator = general(main={"r": 2.0, "dense": 0.0}, other={"r": 3.0, "dense": -1e-9})
    assert [m.values["loss"] for m in evaluator.evaluate(["r", "dense"], SMALL)] == [pytest.approx(1.0), 0.0]


def test_the_reference_is_measured_once_a_fidelity():
    evaluator = general(main={"r": 2.0, "a": 1.0}, other={"r": 2.0, "a": 1.0})
    for fidelity in (SMALL, SMALL, LARGE):
        evaluator.evaluate(["a"], fidelity)
    assert [e.asked.count("r") for e in evaluator._cases.values()] == [2, 2]


def test_what_is_infeasible_in_one_case_is_named_and_not_measured_in_others():
    evaluator = general(
        main={"r": 1.0, "a": 1.0, "b": None}, mid={"r": 1.0, "a": None}, last={"r": 1.0, "a": 1.0}
    )
    a, b = evaluator.evaluate(["a", "b"], SMALL)
    assert a.infeasible == "Expected finite values, got log(-1). (Case mid.)"
    assert b.infeasible == "Expected finite values, got log(-1). (Case main.)"
    assert (a.n_tokens, b.n_tokens) == (64, 0)
    assert evaluator._cases["last"].asked == []


@pytest.mark.parametrize("loss", [None, 0.0])
def test_a_reference_without_a_loss_is_an_error(loss):
    with pytest.raises(ValueError, match=r"Expected a loss of 'r'.* in case other"):
        general(main={"r": 1.0, "a": 1.0}, other={"r": loss, "a": 1.0}).evaluate(["a"], SMALL)


def test_a_single_case_is_measured_as_it_is():
    only = Fixed({})
    assert in_general({MAIN: only}, space=None) is only


# --- real models ------------------------------------------------------------------------------------------------------


def save(directory, seed, **changes):
    small_llama(seed, **changes).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two models and a text for both."""
    where = tmp_path_factory.mktemp("places")
    lines = [" ".join(f"w{token}" for token in row) for row in random_tokens(200, 16, seed=5).tolist()]
    (where / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return save(where / "one", 0), save(where / "two", 1, hidden_size=16, n_layers=3), str(where / "text.txt")


def settings(places, *also, **changes):
    one, _, text = places
    space = {"kind": "formula", "target": 0.5, "terminals": ["W", "X"], "known": ["wanda", "magnitude"]}
    data = dict.fromkeys(("calibration", "search", "test"), text)
    sizes = {"window": 16, "calibration_tokens": 256, "fidelities": [64, 256], "test_tokens": 64}
    raw = {
        "model": one,
        "space": space | {"also": list(also)},
        "controller": {"kind": "random"},
        "evaluator": {**sizes, "data": data},
        "objectives": ["loss", "nodes"],
        "budget": {"evaluations": 12},
    }
    return settings_from({**raw, **changes})


def also(places):
    return (
        {"target": 0.6},
        {"group_size": 4},
        {"model": places[1]},
        {"model": places[1], "comparison": "layer"},
    )


@pytest.fixture(scope="module")
def session(places, tmp_path_factory):
    made = Session(plan(settings(places, *also(places))))
    made.directory = tmp_path_factory.mktemp("store") / "levels"
    made.build_levels(made.directory)
    return made


def names(places):
    return [MAIN, "target=0.6", "group_size=4", f"model={places[1]}", f"model={places[1]},comparison=layer"]


def test_each_case_is_measured_as_a_run_of_its_own_would(session, places, tmp_path):
    [found] = session.evaluator(session.directory).evaluate([MAGNITUDE], LARGE)
    for name, case in zip(names(places), [{}, *also(places)], strict=True):
        model = case.get("model", places[0])
        changes = {key: value for key, value in case.items() if key != "model"}
        alone = settings(places, model=model)
        alone = alone.model_copy(update={"space": alone.space.model_copy(update=changes)})
        other = Session(plan(alone))
        other.build_levels(tmp_path / name.replace("/", "-"))
        [expected] = other.evaluator(tmp_path / name.replace("/", "-")).evaluate([MAGNITUDE], LARGE)
        assert found.values[f"loss:{name}"] == pytest.approx(expected.values["loss"], rel=1e-6), name
        if name == MAIN:
            assert {key: found.values[key] for key in ("kl", "ce", "nodes")} == pytest.approx(
                {key: expected.values[key] for key in ("kl", "ce", "nodes")}, rel=1e-6
            )
    assert found.n_tokens == 5 * 256


def test_models_are_dense_again_and_every_fidelity_is_answered(session):
    before = [x.weight.clone() for b in (session, *session.others) for x in b.anatomy.linears]
    evaluator = session.evaluator(session.directory)
    for fidelity in (session.plan.proxy, SMALL, TEST):
        wanda, dense, magnitude = evaluator.evaluate([WANDA, "dense", MAGNITUDE], fidelity)
        assert wanda.values["loss"] == pytest.approx(1.0)
        assert dense.values["loss"] < 1e-3
        assert magnitude.values["loss"] != pytest.approx(1.0)
    after = [x.weight for b in (session, *session.others) for x in b.anatomy.linears]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_worker_measures_what_the_driver_does(session, places, tmp_path):
    setup = worker_setup(
        session, tmp_path / "kit", session.directory, threads=torch.get_num_threads(), spread=False
    )
    assert len(setup.directories) == 6
    worker = pickle.loads(pickle.dumps(setup))(setup.directories)
    for fidelity in (session.plan.proxy, SMALL):
        [here] = session.evaluator(session.directory).evaluate([MAGNITUDE], fidelity)
        [there] = worker.evaluate([MAGNITUDE], fidelity)
        assert dict(there.values) == pytest.approx(dict(here.values), rel=1e-4)
        assert {f"loss:{name}" for name in names(places)} <= set(there.values)


def test_models_are_loaded_once_whatever_the_number_of_cases(session, places):
    assert list(session.cases) == names(places)[:3]
    assert [list(other.cases) for other in session.others] == [names(places)[3:]]
    assert session.others[0].others == ()
    assert [case.space.also for case in cases_of(session.plan).values()] == [()] * 5


# --- a search ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(places, tmp_path_factory):
    controller = {"kind": "genetic", "offspring": 2, "start": 4, "oversampling": 4, "constants": None}
    wanted = settings(places, {"target": 0.7}, {"model": places[1]}, controller=controller)
    directory = tmp_path_factory.mktemp("made") / "run"
    app.search(wanted, directory)
    return open_run(directory)


def test_a_search_compares_the_mean_and_keeps_each_loss(run, places):
    assert run.baselines["wanda@0.5"].measurement.values["loss"] == pytest.approx(1.0)
    for trial in run.trials():
        assert {"loss:main", "loss:target=0.7", f"loss:model={places[1]}"} <= set(trial.measurement.values)
    assert run.test_of(run.baselines["wanda@0.5"]).values["loss"] == pytest.approx(1.0)
    assert "geometric mean over 3 cases of the ratio to the loss of abs(W) * X" in " ".join(
        caption(run).split()
    )


def test_formulas_are_screened_in_all_cases_at_no_cost(run, places):
    found = [t.measurement for t in run.study.trials if t.measurement.fidelity.part == "proxy"]
    screened = [m for m in found if m.infeasible is None]
    assert len(screened) >= 4
    assert all(m.n_tokens == 0 and f"loss:model={places[1]}" in m.values for m in screened)
    assert run.study.spent.evaluations == 12
    assert len({m.values["loss"] for m in screened}) > 1


def test_the_overlap_of_masks_is_kept_and_reported(run, places):
    found = json.loads((run.study.directory / "formulas.json").read_text(encoding="utf-8"))
    assert found["known"] == {"wanda": WANDA, "magnitude": MAGNITUDE}
    overlaps = found["overlap"]
    assert overlaps[WANDA]["wanda"] == overlaps[MAGNITUDE]["magnitude"] == 1.0
    assert overlaps[WANDA]["magnitude"] == pytest.approx(overlaps[MAGNITUDE]["wanda"])
    assert all(0 <= share <= 1 for shares in overlaps.values() for share in shares.values())
    best = min(run.trials(), key=lambda t: (t.measurement.candidate == "dense", t.measurement.values["loss"]))
    assert best.measurement.candidate in overlaps
    page = write_report(run)[0].read_text(encoding="utf-8")
    assert "pruned by wanda" in page
    assert f"cases: main; target=0.7; model={places[1]}" in page


def test_continuing_with_other_cases_is_another_search(run, places):
    one, two = settings(places), settings(places, {"target": 0.6})
    assert identity(one) != identity(two)
    with pytest.raises(UsageError, match="Expected the search that"):
        app.search(settings(places, {"target": 0.6}), run.study.directory)
    raw = run.settings.model_dump(mode="json")
    raw["space"]["target"] = 0.4
    with pytest.raises(UsageError, match=r"space\.target"):  # a formula does not name its target
        app.search(settings_from(raw), run.study.directory)


def test_another_model_that_is_not_there_is_refused_before_anything_is_written(places, tmp_path):
    with pytest.raises(UsageError, match="no-such-model"):
        app.search(settings(places, {"model": str(tmp_path / "no-such-model")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ([{}], "each of `also` to name"),
        ([{"target": 1.5}], r"`space\.also\.0\.target` to be less than 1, got 1\.5"),
        ([{"target": 0.6}, {"target": 0.6}], r"each of `space\.also` once"),
        ([{"target": 0.6}, {"sparsity": 0.6}], r"a known key in `space\.also\.1`, got 'sparsity'"),
        ([{"group_size": 5}], "group_size` to divide"),
    ],
)
def test_settings_are_checked(places, case, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        app.search(settings(places, *case), tmp_path / "run")
