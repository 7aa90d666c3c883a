"""Tasks of lm-eval in commands, settings, searches and boards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from secateur.evaluators.perplexity import evaluate_model
from secateur.evaluators.tasks.task_set import TaskPlan, TaskSet
from secateur.evaluators.worker_setup import TASKS, worker_setup
from secateur.pruners.models.loading import load_model
from secateur.search import app
from secateur.search.app.evaluating import tasks_in
from secateur.search.app.session import open_session, plan
from secateur.search.board.cells import Cell
from secateur.search.board.settings import board_settings
from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.objectives import objective, oriented
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity, Measurement
from tests.boards import SMALL as BOARD
from tests.boards import measured_here
from tests.tasks import DOCS, TASK, plain_accuracy, task_settings
from tests.toy import LARGE


def test_a_model_is_evaluated_in_tasks(task_directory, tiny):
    facts = evaluate_model(
        "tiny", text="docs", part="test", n_tokens=128, window=64, dtype="auto", device="cpu",
        trust_remote_code=False, tasks=tasks_in(["piqa-local"], task_directory, None),
    )  # fmt: skip
    assert facts["piqa-local acc"] == pytest.approx(plain_accuracy(tiny, DOCS))
    assert facts["piqa-local samples"] == len(DOCS)
    assert {"perplexity", "piqa-local acc_norm"} <= set(facts)


def test_tasks_need_a_directory_and_samples():
    assert tasks_in([], None, None) is None
    with pytest.raises(UsageError, match="Expected `--task-dir` with the files of piqa"):
        tasks_in(["piqa"], None, None)
    with pytest.raises(UsageError, match="Expected `--samples` >= 1, got 0"):
        tasks_in(["piqa"], Path(), 0)


def test_more_accuracy_is_better():
    assert objective("task:piqa").direction == "maximize"
    measured = Measurement("c", LARGE, {"loss": 1.0, "task:piqa": 0.75})
    assert oriented(Trial(0, measured), ("loss", "task:piqa")) == (1.0, -0.75)
    with pytest.raises(ValueError, match=r"Expected known `objectives`, got 'task:'"):
        objective("task:")


def test_settings_of_tasks(task_directory):
    of = plan(settings_from(task_settings(task_directory)))
    assert of.tasks == TaskPlan(("piqa-local",), task_directory, 6, 8, 0)
    assert plan(settings_from(task_settings(task_directory, objectives=["loss"]))).tasks is None
    with pytest.raises(UsageError, match=r"Expected `evaluator.tasks` with the directory .* for task:piqa"):
        settings_from({"objectives": ["loss", "task:piqa"]})
    wanted = task_settings(task_directory)
    wanted["evaluator"] |= {"training": {"tokens": [0, 64]}}
    with pytest.raises(UsageError, match=r"Expected no `evaluator.training` beside task:piqa-local"):
        settings_from(wanted)


def test_an_unknown_task_is_refused_before_the_search_starts(task_directory, tmp_path):
    with pytest.raises(UsageError, match=r"got 'piqa'. There: piqa-local"):
        app.run(tmp_path / "run", **task_settings(task_directory, objectives=["loss", "task:piqa"]))
    assert not (tmp_path / "run").exists()


def test_a_search_weighs_loss_against_accuracy(task_directory, tmp_path):
    run = app.run(tmp_path / "run", **task_settings(task_directory))
    scores = {t.measurement.candidate: t.measurement.values["task:piqa-local"] for t in run.trials()}
    assert len(scores) == 5
    assert {round(6 * score, 6) for score in scores.values()} <= set(map(float, range(7)))
    front = run.front()
    losses = [t.measurement.values["loss"] for t in front]
    accuracies = [t.measurement.values["task:piqa-local"] for t in front]
    assert losses == sorted(losses)
    assert accuracies == sorted(accuracies)
    assert accuracies[-1] == max(scores.values())
    assert "tasks" in run.study.about.identity["content"]
    dense = run.baselines["dense"].measurement
    tasks = replace(plan(run.settings).tasks, directory=task_directory)
    loaded = load_model("tiny")
    alone = TaskSet(tasks, loaded.model, loaded.tokenizer).measure()["piqa-local"].score
    assert dense.values["task:piqa-local"] == alone


def test_workers_read_a_copy_of_the_task_files(task_directory, tmp_path):
    session = open_session(settings_from(task_settings(task_directory)))
    session.build_levels(tmp_path / "levels")
    setup = worker_setup(session, tmp_path / "kit", tmp_path / "levels", threads=1, spread=False)
    assert (tmp_path / "kit" / TASKS / "piqa-local.yaml").read_text() == TASK
    candidate = session.space.baselines()["uniform@0.5"].text
    fidelity = Fidelity("search", 128)
    (here,) = session.evaluator(tmp_path / "levels").evaluate([candidate], fidelity)
    (there,) = setup(setup.directories).evaluate([candidate], fidelity)
    assert here.values == there.values
    assert "task:piqa-local" in here.values


def test_a_board_pairs_the_answers_with_the_dense_models(task_directory, monkeypatch, tmp_path):
    asked = measured_here(monkeypatch)
    of = {**BOARD, "methods": ["magnitude"], "sparsities": ["0.5"], "tasks": ["piqa-local"]}
    board = app.bench(board_settings({**of, "task_dir": str(task_directory)}), tmp_path / "board")
    assert asked == ["tiny | dense", "tiny | magnitude 0.5 | no data"]
    dense, pruned = (board.cells[Cell.parse(text)].values for text in asked)
    assert dense["samples:piqa-local"] == len(DOCS)
    assert dense["won:piqa-local"] == dense["lost:piqa-local"] == 0
    change = (pruned["won:piqa-local"] - pruned["lost:piqa-local"]) / len(DOCS)
    assert pruned["won:piqa-local"] + pruned["lost:piqa-local"] > 0
    assert pruned["task:piqa-local"] == pytest.approx(dense["task:piqa-local"] + change)
    assert board.tasks == ("piqa-local",)


def test_a_board_without_its_task_measures_nothing(task_directory, tmp_path):
    of = board_settings({**BOARD, "tasks": ["arc"], "task_dir": str(task_directory)})
    with pytest.raises(UsageError, match=r"Expected a task of .*, got 'arc'"):
        app.bench(of, tmp_path / "board")
    assert not (tmp_path / "board").exists()
