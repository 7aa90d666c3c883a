"""Expected acceptance, weighted KL and margins: as losses, in runs and exports."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.evaluators.damaged import DAMAGED_SHARE, read_damaged, reference_of
from secateur.evaluators.tasks.task_set import TaskPlan, TaskResult, TaskSet
from secateur.evaluators.worker_setup import worker_setup
from secateur.pruners.models.loading import LoadedModel, load_model
from secateur.search import app
from secateur.search.app.session import open_session
from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.losses import LOSSES, loss_of
from secateur.search.objectives import objective, oriented
from secateur.search.results.pick import Bound
from secateur.search.results.run import open_run
from secateur.search.settings.settings import identity, resolved, settings_from
from secateur.spaces.measurement import Fidelity, Measurement
from tests.tasks import DOCS, TASK

EVALUATOR = {"window": 64, "calibration_tokens": 256, "fidelities": [128, 256], "test_tokens": 128}
SPACES = {
    "allocation": {"granularity": "sublayer", "target": [0.5, 0.9]},
    "architecture": {"target": 0.25},
    "formula": {"target": 0.5, "proxy": None, "known": ["wanda", "magnitude"]},
    "recipe": {"target": 0.5, "samples": [2], "length": [32], "pool_tokens": 2048, "subsets": 1, "known": []},
}


def settings(**changes):
    raw = {
        "space": {"kind": "allocation", **SPACES["allocation"]},
        "controller": {"kind": "random"},
        "evaluator": EVALUATOR,
        "budget": {"evaluations": 4},
    }
    return {**raw, **changes}


# --- damaged positions ---


@pytest.fixture(scope="module")
def damaged_run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    app.run(directory, **settings(evaluator={**EVALUATOR, "loss": "weighted_kl", "measures": ["acceptance"]}))
    return directory


def test_the_positions_are_the_worst_fifth_of_each_window_under_the_reference(damaged_run):
    run = open_run(damaged_run)
    session = open_session(run.settings)
    session.open_damaged(damaged_run)
    assert session.damaged is not None
    reference = reference_of(session.space)
    assert reference == session.space.baselines()["uniform@0.9"].text, "of the middle target"
    tokens = session.windows["search"][:2]
    with torch.no_grad():
        dense = session.loaded.model(input_ids=tokens).logits.double().log_softmax(-1)
    config = session.config(reference)
    session.pruner.prune(config, sequential=False)
    with torch.no_grad():
        pruned = session.loaded.model(input_ids=tokens).logits.double().log_softmax(-1)
    kl = (dense.exp() * (dense - pruned)).sum(-1)
    n = math.ceil(DAMAGED_SHARE * 64)
    for row, chosen in zip(kl, session.damaged["search"], strict=False):
        assert int(chosen.sum()) == n == 13
        assert set(chosen.nonzero()[:, 0].tolist()) == set(row.topk(n).indices.tolist())


def test_weighted_kl_is_the_loss_and_ranks_among_the_damaged(damaged_run):
    run = open_run(damaged_run)
    for trial in run.trials():
        values = trial.measurement.values
        assert values["loss"] == values["weighted_kl"]
        assert 0 <= values["acceptance"] <= 1
    uniform = run.baselines["uniform@0.9"].measurement.values
    assert uniform["weighted_kl"] > 1.3 * uniform["kl"], "the reference's own worst positions"


def test_a_run_keeps_its_positions_when_it_goes_on_with_other_windows(damaged_run):
    run = open_run(damaged_run)
    path = next(damaged_run.glob("damaged-*.safetensors"))
    session = open_session(run.settings)
    before, reference = read_damaged(path, session.windows)
    more = settings(
        evaluator={
            **EVALUATOR,
            "loss": "weighted_kl",
            "measures": ["acceptance"],
            "fidelities": [128, 256, 384],
        },
        space={"kind": "allocation", **SPACES["allocation"], "target": [0.5, 0.7, 0.9]},
        budget={"evaluations": 5},
    )
    continued = open_session(settings_from(more))
    assert read_damaged(path, continued.windows) == (None, reference)
    with pytest.raises(ValueError, match="Expected the positions of `weighted_kl` for these windows"):
        continued.open_damaged(damaged_run)
    app.run(damaged_run, **more)
    after, same = read_damaged(path, continued.windows)
    assert same == reference
    assert before is not None
    assert after is not None
    assert torch.equal(after["search"][:4], before["search"])
    assert torch.equal(after["test"], before["test"])


def test_positions_that_cannot_be_read_are_named_in_a_line(damaged_run, tmp_path):
    session = open_session(open_run(damaged_run).settings)
    name = next(damaged_run.glob("damaged-*.safetensors")).name
    (tmp_path / name).write_bytes(b"0123")
    with pytest.raises(
        ValueError, match=r"Expected the positions of `weighted_kl` in .*, got a file that can't be"
    ):
        session.open_damaged(tmp_path)


def test_equal_seeds_give_equal_trials_with_every_loss(tmp_path):
    for loss in ("weighted_kl", "acceptance"):
        again = [
            app.run(tmp_path / f"{loss}-{i}", **settings(evaluator={**EVALUATOR, "loss": loss}))
            for i in range(2)
        ]
        values = [
            [(t.measurement.candidate, dict(t.measurement.values)) for t in run.trials()] for run in again
        ]
        assert values[0] == values[1]


def test_workers_get_the_positions_of_the_driver(tmp_path):
    session = open_session(settings_from(settings(evaluator={**EVALUATOR, "loss": "weighted_kl"})))
    session.build_levels(tmp_path / "levels")
    session.open_damaged(tmp_path, tmp_path / "levels")
    setup = worker_setup(session, tmp_path / "kit", tmp_path / "levels", threads=1, spread=False)
    text = session.space.baselines()["uniform@0.5"].text
    fidelity = Fidelity("search", 256)
    (there,) = setup(setup.directories).evaluate([text], fidelity)
    (here,) = session.evaluator(tmp_path / "levels").evaluate([text], fidelity)
    assert there.values == here.values
    assert there.values["loss"] == there.values["weighted_kl"] != there.values["kl"]


@pytest.mark.parametrize("kind", SPACES)
def test_every_space_searches_for_every_loss_and_exports_its_measures(kind, tmp_path):
    space = {"kind": kind, **SPACES[kind]}
    evaluator = {**EVALUATOR, "loss": "acceptance", "measures": ["weighted_kl"]}
    run = app.run(tmp_path / "run", **settings(space=space, evaluator=evaluator))
    best = run.front()[0]
    for trial in run.trials():
        values = trial.measurement.values
        assert values["loss"] == pytest.approx(1 - values["acceptance"], abs=1e-12)
        assert values["weighted_kl"] >= 0
    trial = next(t for name, t in run.baselines.items() if name != "dense")
    assert {"acceptance", "weighted_kl"} <= set(run.test_of(best).values)
    summary = app.export(
        tmp_path / "run", trial, tmp_path / "model", calibration=None if kind == "recipe" else "dense"
    )
    for text in ("search:256", "test:128"):
        searched, exported = (summary.measured[f"{text}, as {how}"] for how in ("searched", "exported"))
        for name in ("kl", "acceptance", "weighted_kl"):
            assert exported[name] == pytest.approx(searched[name], rel=1e-3)


# --- margins ---


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    (path / "piqa-local.yaml").write_text(TASK)
    (path / "piqa.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    return path


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny")


@torch.no_grad()
def plain_margins(tiny: LoadedModel, docs) -> list[float]:
    """Log-likelihood of the right answer minus that of the wrong one."""

    def log_likelihood(question: str, answer: str) -> float:
        before = tiny.tokenizer(question).input_ids
        ids = torch.tensor([tiny.tokenizer(f"{question} {answer}").input_ids])
        log_p = tiny.model(input_ids=ids).logits[0].double().log_softmax(-1)
        return sum(float(log_p[i - 1, ids[0, i]]) for i in range(len(before), ids.shape[1]))

    margins = []
    for doc in docs:
        question = f"Question: {doc['goal']}\nAnswer:"
        scores = [log_likelihood(question, doc[name]) for name in ("sol1", "sol2")]
        margins.append(scores[doc["label"]] - scores[1 - doc["label"]])
    return margins


def test_margins_are_those_of_plain_code(directory, tiny):
    tasks = TaskSet(TaskPlan(("piqa-local",), directory, batch=4), tiny.model, tiny.tokenizer)
    result, expected = tasks.measure()["piqa-local"], plain_margins(tiny, DOCS)
    assert result.margins == pytest.approx(expected, rel=1e-4)
    assert result.margin == pytest.approx(np.mean(expected), rel=1e-4)
    assert result.margin_loss == pytest.approx(
        np.mean([math.log1p(math.exp(-x)) for x in expected]), rel=1e-4
    )
    assert result.score == np.mean([x > 0 for x in expected])


def test_samples_of_the_test_are_others_and_those_of_a_share_are_nested(directory, tiny):
    tasks = TaskSet(TaskPlan(("piqa-local",), directory, 4), tiny.model, tiny.tokenizer)
    searched, held_out = set(tasks.samples["piqa-local"]), set(tasks.held_out()["piqa-local"])
    assert len(searched) == len(held_out) == 4
    assert not searched & held_out
    assert tasks.first(1.0) == tasks.samples
    assert set(tasks.first(0.5)["piqa-local"]) < searched
    assert [len(tasks.first(share)["piqa-local"]) for share in (0.01, 0.5, 0.51)] == [1, 2, 3]
    half = tasks.measure(tasks.first(0.5))["piqa-local"]
    assert half.samples == len(half.margins) == 2
    everything = TaskSet(TaskPlan(("piqa-local",), directory, None), tiny.model, tiny.tokenizer)
    with pytest.raises(
        ValueError, match=r"got 10 for the search, which are all. Lower `evaluator.tasks.samples`"
    ):
        everything.held_out()


def test_a_task_without_choices_has_no_margin(directory, tiny, tmp_path):
    text = TASK.replace("piqa-local", "free").replace("multiple_choice", "loglikelihood")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("doc_to_choice"))
    text = text.replace("doc_to_target: label", 'doc_to_target: "{{sol1}}"').replace("acc_norm", "perplexity")
    (tmp_path / "free.yaml").write_text(text)
    (tmp_path / "piqa.jsonl").write_text((directory / "piqa.jsonl").read_text())
    tasks = TaskSet(TaskPlan(("free",), tmp_path), tiny.model, tiny.tokenizer)
    assert tasks.measure()["free"].margins == ()
    with pytest.raises(ValueError, match=r"`output_type` multiple_choice for margin:free, got loglikelihood"):
        tasks.check_margins("free")


def test_a_search_for_margins(directory, tmp_path, tiny):
    of = {**EVALUATOR, "loss": "margin:piqa-local", "tasks": {"directory": str(directory), "samples": 4}}
    raw = settings(
        evaluator=of,
        objectives=["loss", "params", "margin:piqa-local"],
        controller={"kind": "evolution", "offspring": 2},
    )
    run = app.run(tmp_path / "run", **raw)
    tasks = TaskSet(TaskPlan(("piqa-local",), directory, 4), tiny.model, tiny.tokenizer)
    dense = run.baselines["dense"]
    order = np.random.default_rng(0).permutation(len(DOCS))
    margins = plain_margins(tiny, [DOCS[i] for i in sorted(order[:4])])
    values = dense.measurement.values
    assert values["margin:piqa-local"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert values["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-x)) for x in margins]), rel=1e-4)
    others = plain_margins(tiny, [DOCS[i] for i in sorted(order[4:8])])
    assert run.test_of(dense).values["margin:piqa-local"] == pytest.approx(np.mean(others), rel=1e-4)
    small = [t for t in run.study.trials if t.measurement.fidelity == Fidelity("search", 128)]
    assert small, "halving began at the smaller fidelity, on half of the samples"
    assert all({"loss", "kl", "task:piqa-local"} <= set(t.measurement.values) for t in small)
    assert tasks.first(0.5)["piqa-local"] == sorted(order[:2])


# --- settings and texts ---


def test_measures_follow_from_loss_and_objectives():
    plain = settings_from(settings())
    assert plain.measures == ()
    assert "measures" not in identity(plain)["evaluator"], "as in studies from before"
    wanted = settings_from(
        settings(objectives=["loss", "acceptance"], evaluator={**EVALUATOR, "loss": "weighted_kl"})
    )
    assert wanted.measures == ("weighted_kl", "acceptance")
    assert identity(wanted)["evaluator"]["measures"] == ["weighted_kl", "acceptance"]
    assert settings_from(resolved(wanted)) == wanted


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"loss": "wheighted_kl"},
            "`evaluator.loss` to be kl, ce, weighted_kl, acceptance, margin:<task>, got",
        ),
        ({"loss": "margin:"}, "`evaluator.loss` to be kl, ce"),
        ({"loss": "margin:piqa"}, "`evaluator.tasks` with the directory of its files for margin:piqa"),
        ({"measures": ["kl"]}, "evaluator.measures"),
    ],
)
def test_wrong_losses_are_refused(changes, error):
    with pytest.raises(UsageError, match=error.replace("(", r"\(")):
        settings_from(settings(evaluator={**EVALUATOR, **changes}))


def test_a_margin_is_measured_in_one_case_and_untrained(directory):
    of = {**EVALUATOR, "loss": "margin:piqa-local", "tasks": {"directory": str(directory), "samples": 4}}
    formula = {"kind": "formula", **SPACES["formula"], "also": [{"target": 0.6}]}
    with pytest.raises(UsageError, match=r"Expected no `space.also` beside the loss margin:piqa-local"):
        settings_from(settings(space=formula, evaluator=of))
    with pytest.raises(UsageError, match=r"Expected no `evaluator.training` beside margin:piqa-local"):
        settings_from(settings(evaluator={**of, "training": {"tokens": [0, 64]}}))


def test_directions_units_and_bounds():
    assert objective("acceptance").direction == objective("margin:piqa").direction == "maximize"
    assert objective("loss").unit == "nats/token"
    assert objective("loss", "acceptance").unit == ""
    assert objective("loss", "margin:piqa").unit == "nats/sample"
    with pytest.raises(ValueError, match=r"Expected known `objectives`, got 'margin:'"):
        objective("margin:")
    values = {"loss": 0.25, "acceptance": 0.75, "margin:piqa": -0.5}
    trial = Trial(0, Measurement("c", Fidelity("search", 64), values))
    assert oriented(trial, ("loss", "acceptance", "margin:piqa")) == (0.25, -0.75, 0.5)
    assert Bound.parse("min-acceptance", "0.75").excess(trial, None) == 0
    assert Bound.parse("min-acceptance", "0.7501").excess(trial, None) > 0
    assert set(LOSSES) == {"kl", "ce", "weighted_kl", "acceptance"}
    assert loss_of("margin:piqa").summary == "log(1 + exp(-margin)) of the right answers in piqa"


def test_a_result_without_margins_has_a_score():
    result = TaskResult({"acc": 0.5}, 2)
    assert result.margins == ()
    assert replace(result, margins=(1.0, -3.0)).margin == -1.0
