"""Margins of the right answers of a task: values against plain code, samples, and searches for them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from secateur.evaluators.tasks.task_set import TaskPlan, TaskResult, TaskSet
from secateur.search import app
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity
from tests.measures import EVALUATOR, SPACES, settings
from tests.tasks import DOCS, TASK, plain_margins


def test_margins_are_those_of_plain_code(task_directory, tiny):
    tasks = TaskSet(TaskPlan(("piqa-local",), task_directory, batch=4), tiny.model, tiny.tokenizer)
    result, expected = tasks.measure()["piqa-local"], plain_margins(tiny, DOCS)
    assert result.margins == pytest.approx(expected, rel=1e-4)
    assert result.margin == pytest.approx(np.mean(expected), rel=1e-4)
    assert result.margin_loss == pytest.approx(
        np.mean([math.log1p(math.exp(-x)) for x in expected]), rel=1e-4
    )
    assert result.score == np.mean([x > 0 for x in expected])


def test_samples_of_the_test_are_others_and_those_of_a_share_are_nested(task_directory, tiny):
    tasks = TaskSet(TaskPlan(("piqa-local",), task_directory, 4), tiny.model, tiny.tokenizer)
    searched, held_out = set(tasks.samples["piqa-local"]), set(tasks.held_out()["piqa-local"])
    assert len(searched) == len(held_out) == 4
    assert not searched & held_out
    assert tasks.first(1.0) == tasks.samples
    assert set(tasks.first(0.5)["piqa-local"]) < searched
    assert [len(tasks.first(share)["piqa-local"]) for share in (0.01, 0.5, 0.51)] == [1, 2, 3]
    half = tasks.measure(tasks.first(0.5))["piqa-local"]
    assert half.samples == len(half.margins) == 2
    everything = TaskSet(TaskPlan(("piqa-local",), task_directory, None), tiny.model, tiny.tokenizer)
    with pytest.raises(
        ValueError, match=r"got 10 for the search, which are all. Lower `evaluator.tasks.samples`"
    ):
        everything.held_out()


def test_a_task_without_choices_has_no_margin(task_directory, tiny, tmp_path):
    text = TASK.replace("piqa-local", "free").replace("multiple_choice", "loglikelihood")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("doc_to_choice"))
    text = text.replace("doc_to_target: label", 'doc_to_target: "{{sol1}}"').replace("acc_norm", "perplexity")
    (tmp_path / "free.yaml").write_text(text)
    (tmp_path / "piqa.jsonl").write_text((task_directory / "piqa.jsonl").read_text())
    tasks = TaskSet(TaskPlan(("free",), tmp_path), tiny.model, tiny.tokenizer)
    assert tasks.measure()["free"].margins == ()
    with pytest.raises(ValueError, match=r"`output_type` multiple_choice for margin:free, got loglikelihood"):
        tasks.check_margins("free")


def test_a_result_without_margins_has_a_score():
    result = TaskResult({"acc": 0.5}, 2)
    assert result.margins == ()
    assert replace(result, margins=(1.0, -3.0)).margin == -1.0


def test_a_search_for_margins(task_directory, tmp_path, tiny):
    of = {**EVALUATOR, "loss": "margin:piqa-local", "tasks": {"directory": str(task_directory), "samples": 4}}
    raw = settings(
        evaluator=of,
        objectives=["loss", "params", "margin:piqa-local"],
        controller={"kind": "evolution", "offspring": 2},
    )
    run = app.run(tmp_path / "run", **raw)
    tasks = TaskSet(TaskPlan(("piqa-local",), task_directory, 4), tiny.model, tiny.tokenizer)
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


def test_a_margin_is_measured_in_one_case_and_untrained(task_directory):
    of = {**EVALUATOR, "loss": "margin:piqa-local", "tasks": {"directory": str(task_directory), "samples": 4}}
    formula = {"kind": "formula", **SPACES["formula"], "also": [{"target": 0.6}]}
    with pytest.raises(UsageError, match=r"Expected no `space.also` beside the loss margin:piqa-local"):
        settings_from(settings(space=formula, evaluator=of))
    with pytest.raises(UsageError, match=r"Expected no `evaluator.training` beside margin:piqa-local"):
        settings_from(settings(evaluator={**of, "training": {"tokens": [0, 64]}}))
