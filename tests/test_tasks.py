"""Tasks of lm-eval on live models: scores against plain code, samples, errors, and beside another evaluator."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.tasks.evaluator import TaskEvaluator
from secateur.evaluators.tasks.task_set import TaskPlan, TaskResult, TaskSet, tasks_sha256
from secateur.pruners.pruner import Pruner
from tests.tasks import DOCS, TASK, plain_accuracy
from tests.toy import LARGE, SMALL, SPACE, ToyEvaluator

# --- scores ---


@pytest.fixture(scope="module")
def toy(task_directory, tiny) -> TaskSet:
    return TaskSet(TaskPlan(("piqa-local",), task_directory, batch=4), tiny.model, tiny.tokenizer)


def test_scores_are_those_of_plain_code(toy, tiny):
    result = toy.measure()["piqa-local"]
    assert result.samples == len(DOCS)
    assert list(result.metrics) == ["acc", "acc_norm"]
    assert result.score == result.metrics["acc"] == pytest.approx(plain_accuracy(tiny, DOCS))


def test_scores_follow_the_live_weights(toy, tiny):
    before = toy.measure()["piqa-local"].metrics
    head = tiny.model.get_output_embeddings().weight
    kept = head.data
    head.data = -kept
    try:
        changed, wanted = toy.measure()["piqa-local"].metrics, plain_accuracy(tiny, DOCS)
    finally:
        head.data = kept
    assert changed["acc"] == pytest.approx(wanted)
    assert changed != before
    assert toy.measure()["piqa-local"].metrics == before


def test_samples_are_the_same_for_all_and_nested(task_directory, tiny):
    def chosen(samples, seed=0):
        tasks = TaskSet(
            TaskPlan(("piqa-local",), task_directory, samples, seed=seed), tiny.model, tiny.tokenizer
        )
        return set(tasks.samples["piqa-local"])

    assert len(chosen(3)) == 3
    assert chosen(3) == chosen(3)
    assert chosen(3) < chosen(6) < chosen(None) == set(range(len(DOCS))) == chosen(100)
    assert chosen(5) != chosen(5, seed=1)


def test_nothing_is_printed(toy, capfd, caplog):
    toy.measure()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# --- errors ---


def test_wrong_tasks_are_refused(task_directory, tiny, tmp_path):
    def load(names, where):
        return TaskSet(TaskPlan(tuple(names), Path(where)), tiny.model, tiny.tokenizer)

    with pytest.raises(ValueError, match=r"Expected a directory of task files, got .*none, which is none"):
        load(["piqa-local"], tmp_path / "none")
    with pytest.raises(ValueError, match=r"Expected a task of .*, got 'piqa'. There: piqa-local"):
        load(["piqa"], task_directory)
    (tmp_path / "worse.yaml").write_text(
        TASK.replace("piqa-local", "worse")
        .replace("metric: acc,", "metric: brier_score,")
        .replace(
            "brier_score, aggregation: mean, higher_is_better: true",
            "brier_score, aggregation: brier_score, higher_is_better: false",
        )
    )
    (tmp_path / "piqa.jsonl").write_text((task_directory / "piqa.jsonl").read_text())
    with pytest.raises(
        ValueError, match="first metric of the task worse to be better when higher, got brier_score"
    ):
        load(["worse"], tmp_path)
    (tmp_path / "gone.yaml").write_text(
        TASK.replace("piqa-local", "gone").replace("piqa.jsonl", "gone.jsonl")
    )
    with pytest.raises(
        ValueError, match=r"Expected tasks that lm-eval can load in .*, got FileNotFoundError"
    ):
        load(["gone"], tmp_path)


def test_without_lm_eval_the_error_says_what_to_install(task_directory, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"pip install 'secateur\[tasks\]'"):
        TaskSet(TaskPlan(("piqa-local",), task_directory), tiny.model, tiny.tokenizer)


def test_the_hash_is_of_files_and_samples(task_directory, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in task_directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    base = TaskPlan(("piqa-local",), task_directory, 5)
    assert tasks_sha256(replace(base, directory=copy)) == tasks_sha256(base)
    assert tasks_sha256(replace(base, samples=6)) != tasks_sha256(base)
    (copy / "piqa.jsonl").write_text("{}\n")
    assert tasks_sha256(replace(base, directory=copy)) != tasks_sha256(base)


# --- beside another evaluator ---


class Bits(Pruner):
    """A pruner over bits: one block a bit."""

    def __init__(self) -> None:
        self.space = SPACE
        self.now = "0" * SPACE.n

    def keys(self, config):
        return tuple(config["bits"])

    def apply(self, block, key):
        self.now = self.now[:block] + key + self.now[block + 1 :]

    def restore(self):
        self.now = "0" * SPACE.n


Bits.__abstractmethods__ = frozenset()  # only what a search switches by


class Losses(ToyEvaluator, Evaluator):
    """The toy's losses."""


class FakeTasks(TaskSet):
    """Scores the share of zeros in what the switcher is at, or fails."""

    def __init__(self, switcher: Bits, fails: bool = False) -> None:
        self.switcher = switcher
        self.fails = fails
        self.n_measured = 0

    def measure(self):
        if self.fails:
            raise RuntimeError("no room")
        self.n_measured += 1
        return {"zeros": TaskResult({"acc": self.switcher.now.count("0") / SPACE.n}, 7)}


def test_tasks_are_measured_at_one_fidelity_once_for_equal_weights():
    switcher = Bits()
    tasks = FakeTasks(switcher)
    evaluator = TaskEvaluator(Losses(SPACE), switcher, tasks, LARGE)
    texts = ["0011100000", "0000000000", "1100000000", "0011100000"]  # the third is infeasible
    small, large = evaluator.evaluate(texts, SMALL), evaluator.evaluate(texts, LARGE)
    assert small == ToyEvaluator(SPACE).evaluate(texts, SMALL)
    assert [m.values.get("task:zeros") for m in large] == [0.7, 1.0, None, 0.7]
    assert tasks.n_measured == 2
    assert switcher.now == "0" * SPACE.n
    plain = ToyEvaluator(SPACE).evaluate(texts, LARGE)
    for measured, without in zip(large, plain, strict=True):
        assert {k: v for k, v in measured.values.items() if k != "task:zeros"} == dict(without.values)


def test_the_model_is_dense_again_after_a_task_fails():
    switcher = Bits()
    evaluator = TaskEvaluator(Losses(SPACE), switcher, FakeTasks(switcher, fails=True), LARGE)
    with pytest.raises(RuntimeError, match="no room"):
        evaluator.evaluate(["0011100000"], LARGE)
    assert switcher.now == "0" * SPACE.n
