"""Tasks of lm-eval on live models: scores against plain code, samples, errors, objectives of a search."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.perplexity import evaluate_model
from secateur.evaluators.tasks.evaluator import TaskEvaluator
from secateur.evaluators.tasks.task_set import TaskPlan, TaskResult, TaskSet, tasks_sha256
from secateur.evaluators.worker_setup import TASKS, worker_setup
from secateur.pruners.models.loading import LoadedModel, load_model
from secateur.pruners.pruner import Pruner
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
from tests.toy import LARGE, SMALL, SPACE, ToyEvaluator

TASK = (Path(__file__).parent.parent / "docs" / "tasks" / "piqa-local.yaml").read_text()
DOCS = [
    {"goal": f"what is {thing} for?", "sol1": right, "sol2": wrong, "label": i % 2}
    for i, (thing, right, wrong) in enumerate(
        [
            ("a list", "to hold several values in order", "to swim"),
            ("a loop", "to repeat statements", "purple"),
            ("an import", "to use another module", "the cat of the"),
            ("a class", "to make objects", "to to to to to to"),
            ("an exception", "to report an error", "7"),
            ("a function", "to call code by a name", "under a tree, perhaps"),
            ("a dictionary", "to map keys to values", "never"),
            ("a comment", "to explain the code", "to raise SystemExit twice"),
            ("yield", "to make a generator", "a kind of cheese"),
            ("pass", "to do nothing", "to do everything at once"),
        ]
    )
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    (path / "piqa-local.yaml").write_text(TASK)
    (path / "piqa.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    return path


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny")


@pytest.fixture(scope="module")
def toy(directory, tiny) -> TaskSet:
    return TaskSet(TaskPlan(("piqa-local",), directory, batch=4), tiny.model, tiny.tokenizer)


@torch.no_grad()
def plain_accuracy(tiny: LoadedModel, docs) -> float:
    """Share of documents whose right answer is the likelier one after the question."""

    def log_likelihood(question: str, answer: str) -> float:
        before = tiny.tokenizer(question).input_ids
        ids = torch.tensor([tiny.tokenizer(f"{question} {answer}").input_ids])
        log_p = tiny.model(input_ids=ids).logits[0].float().log_softmax(-1)
        return sum(float(log_p[i - 1, ids[0, i]]) for i in range(len(before), ids.shape[1]))

    right = 0
    for doc in docs:
        question = f"Question: {doc['goal']}\nAnswer:"
        scores = [log_likelihood(question, doc[name]) for name in ("sol1", "sol2")]
        right += int(np.argmax(scores)) == doc["label"]
    return right / len(docs)


# --- scores ---


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


def test_samples_are_the_same_for_all_and_nested(directory, tiny):
    def chosen(samples, seed=0):
        tasks = TaskSet(TaskPlan(("piqa-local",), directory, samples, seed=seed), tiny.model, tiny.tokenizer)
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


def test_wrong_tasks_are_refused(directory, tiny, tmp_path):
    def load(names, where):
        return TaskSet(TaskPlan(tuple(names), Path(where)), tiny.model, tiny.tokenizer)

    with pytest.raises(ValueError, match=r"Expected a directory of task files, got .*none, which is none"):
        load(["piqa-local"], tmp_path / "none")
    with pytest.raises(ValueError, match=r"Expected a task of .*, got 'piqa'. There: piqa-local"):
        load(["piqa"], directory)
    (tmp_path / "worse.yaml").write_text(
        TASK.replace("piqa-local", "worse")
        .replace("metric: acc,", "metric: brier_score,")
        .replace(
            "brier_score, aggregation: mean, higher_is_better: true",
            "brier_score, aggregation: brier_score, higher_is_better: false",
        )
    )
    (tmp_path / "piqa.jsonl").write_text((directory / "piqa.jsonl").read_text())
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


def test_without_lm_eval_the_error_says_what_to_install(directory, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"pip install 'secateur\[tasks\]'"):
        TaskSet(TaskPlan(("piqa-local",), directory), tiny.model, tiny.tokenizer)


def test_the_hash_is_of_files_and_samples(directory, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    base = TaskPlan(("piqa-local",), directory, 5)
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


# --- commands and settings ---


def test_a_model_is_evaluated_in_tasks(directory, tiny):
    facts = evaluate_model(
        "tiny", text="docs", part="test", n_tokens=128, window=64, dtype="auto", device="cpu",
        trust_remote_code=False, tasks=tasks_in(["piqa-local"], directory, None),
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


def settings(directory, **changes):
    evaluator = {"window": 64, "calibration_tokens": 256, "fidelities": [64, 128], "test_tokens": 64}
    evaluator |= {"tasks": {"directory": str(directory), "samples": 6}}
    raw = {
        "space": {"metric": "wanda", "granularity": "sublayer", "target": [0.5, 0.9]},
        "controller": {"kind": "random"},
        "evaluator": evaluator,
        "objectives": ["loss", "task:piqa-local"],
        "budget": {"evaluations": 5},
    }
    return {**raw, **changes}


def test_settings_of_tasks(directory):
    of = plan(settings_from(settings(directory)))
    assert of.tasks == TaskPlan(("piqa-local",), directory, 6, 8, 0)
    assert plan(settings_from(settings(directory, objectives=["loss"]))).tasks is None
    with pytest.raises(UsageError, match=r"Expected `evaluator.tasks` with the directory .* for task:piqa"):
        settings_from({"objectives": ["loss", "task:piqa"]})
    wanted = settings(directory)
    wanted["evaluator"] |= {"training": {"tokens": [0, 64]}}
    with pytest.raises(UsageError, match=r"Expected no `evaluator.training` beside task:piqa-local"):
        settings_from(wanted)


def test_an_unknown_task_is_refused_before_the_search_starts(directory, tmp_path):
    with pytest.raises(UsageError, match=r"got 'piqa'. There: piqa-local"):
        app.run(tmp_path / "run", **settings(directory, objectives=["loss", "task:piqa"]))
    assert not (tmp_path / "run").exists()


def test_a_search_weighs_loss_against_accuracy(directory, tmp_path):
    run = app.run(tmp_path / "run", **settings(directory))
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
    tasks = replace(plan(run.settings).tasks, directory=directory)
    loaded = load_model("tiny")
    alone = TaskSet(tasks, loaded.model, loaded.tokenizer).measure()["piqa-local"].score
    assert dense.values["task:piqa-local"] == alone


def test_workers_read_a_copy_of_the_task_files(directory, tmp_path):
    session = open_session(settings_from(settings(directory)))
    session.build_levels(tmp_path / "levels")
    setup = worker_setup(session, tmp_path / "kit", tmp_path / "levels", threads=1, spread=False)
    assert (tmp_path / "kit" / TASKS / "piqa-local.yaml").read_text() == TASK
    candidate = session.space.baselines()["uniform@0.5"].text
    fidelity = Fidelity("search", 128)
    (here,) = session.evaluator(tmp_path / "levels").evaluate([candidate], fidelity)
    (there,) = setup(setup.directories).evaluate([candidate], fidelity)
    assert here.values == there.values
    assert "task:piqa-local" in here.values


# --- code and paths in task files ---

INTERNALS = "{{ cycler.__init__.__globals__.os.system('touch ran') }}"
HIDDEN = "{{ cycler['__in' ~ 'it__']['__glo' ~ 'bals__'].os.system('touch ran') }}"


@pytest.fixture
def altered(directory, tmp_path):
    """Writes a copy of the task with one piece of it replaced, and gives its directory."""

    def write(old, new, name="piqa-local.yaml"):
        (tmp_path / "piqa.jsonl").write_text((directory / "piqa.jsonl").read_text())
        (tmp_path / "u.py").write_text("open('ran', 'w').close()\ndef f(docs):\n    return docs\n")
        assert old in TASK
        (tmp_path / name).write_text(TASK.replace(old, new))
        return tmp_path

    return write


CODE = {
    "function": ("doc_to_target:", "process_docs: !function u.f\ndoc_to_target:", 10, "!function 'u.f'"),
    "key": ("doc_to_target:", "metadata: {? !function u.f : 1}\ndoc_to_target:", 10, "!function 'u.f'"),
    "template": ('"Question: {{goal}}\\nAnswer:"', f'"{INTERNALS}"', 8, "cycler.__init__"),
    "metric": ("metric: acc,", "metric: u.py,", 12, "u.py"),
}


@pytest.mark.parametrize("case", CODE)
def test_code_in_task_files_is_refused_before_a_model_is_loaded(altered, secateur, case):
    old, new, line, named = CODE[case]
    where = altered(old, new)
    code, out, err = secateur("evaluate", "nowhere", "--tasks", "piqa-local", "--task-dir", where)
    assert (code, out) == (2, "")
    (message,) = [line for line in err.splitlines() if "Expected" in line]
    assert "Expected task files without code" in message
    assert named in message
    assert f"(piqa-local.yaml, line {line})" in message
    assert "--trust-remote-code" in message
    assert not (where / "ran").exists()


def test_code_in_task_files_stops_a_search_and_runs_if_trusted(altered, tmp_path, tiny):
    where = altered(*CODE["function"][:2])
    with pytest.raises(UsageError, match="Expected task files without code"):
        app.run(tmp_path / "run", **settings(where, model="nowhere"))
    plan = TaskPlan(("piqa-local",), where, trusted=True)
    TaskSet(plan, tiny.model, tiny.tokenizer)
    assert (where / "ran").exists()


@pytest.mark.parametrize(
    "rendered", ["{{goal}}", "{% if goal == 'what is pass for?' %}" + HIDDEN + "{% endif %}"]
)
def test_templates_are_rendered_in_a_sandbox(altered, tiny, monkeypatch, rendered):
    where = altered('"Question: {{goal}}\\nAnswer:"', f'"{rendered}"')
    monkeypatch.chdir(where)
    tasks = TaskSet(TaskPlan(("piqa-local",), where), tiny.model, tiny.tokenizer)
    if rendered == "{{goal}}":
        assert tasks.measure()["piqa-local"].samples == len(DOCS)
    else:
        with pytest.raises(ValueError, match="Expected templates without code"):
            tasks.measure()
    assert not (where / "ran").exists()


def test_a_hidden_template_is_refused_when_it_is_loaded(altered, tiny):
    where = altered('"Question: {{goal}}\\nAnswer:"', f'"{HIDDEN}"')
    with pytest.raises(ValueError, match=r"lm-eval can load .* got SecurityError"):
        TaskSet(TaskPlan(("piqa-local",), where), tiny.model, tiny.tokenizer)
    assert not (where / "ran").exists()


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("piqa.jsonl", "../secret/piqa.jsonl", "data_files"),
        ("piqa.jsonl", "[piqa.jsonl, sub/../../x.jsonl]", "data_files"),
        ("piqa.jsonl", "/etc/passwd", "data_files"),
        ("piqa.jsonl", "'file:///etc/passwd'", "data_files"),
        ("dataset_path: json", "dataset_path: ../secret", "dataset_path"),
        ("task: piqa-local", "include: ../other.yaml\ntask: piqa-local", "include"),
    ],
)
def test_a_path_that_leaves_the_task_directory_is_refused(altered, old, new, key):
    where = altered(old, new)
    with pytest.raises(
        ValueError, match=rf"Expected `{key}` within the directory, got .*piqa-local.yaml, line \d"
    ):
        TaskPlan(("piqa-local",), where, trusted=True)


def test_included_files_and_paths_within_the_directory_are_read(altered, tiny):
    where = altered("label\n", "label\nprocess_docs: !function u.f\n", name="_base")
    (where / "piqa-local.yaml").write_text("include: _base\ntask: piqa-local\n")
    with pytest.raises(ValueError, match=r"got !function 'u.f' \(_base, line \d+\)"):
        TaskPlan(("piqa-local",), where)
    altered("piqa.jsonl", str(where / "piqa.jsonl"), name="_base")
    assert (
        len(TaskSet(TaskPlan(("piqa-local",), where), tiny.model, tiny.tokenizer).samples["piqa-local"]) == 10
    )


def test_a_board_pairs_the_answers_with_the_dense_models(directory, monkeypatch, tmp_path):
    asked = measured_here(monkeypatch)
    of = {**BOARD, "methods": ["magnitude"], "sparsities": ["0.5"], "tasks": ["piqa-local"]}
    board = app.bench(board_settings({**of, "task_dir": str(directory)}), tmp_path / "board")
    assert asked == ["tiny | dense", "tiny | magnitude 0.5 | no data"]
    dense, pruned = (board.cells[Cell.parse(text)].values for text in asked)
    assert dense["samples:piqa-local"] == len(DOCS)
    assert dense["won:piqa-local"] == dense["lost:piqa-local"] == 0
    change = (pruned["won:piqa-local"] - pruned["lost:piqa-local"]) / len(DOCS)
    assert pruned["won:piqa-local"] + pruned["lost:piqa-local"] > 0
    assert pruned["task:piqa-local"] == pytest.approx(dense["task:piqa-local"] + change)
    assert board.tasks == ("piqa-local",)


def test_a_board_without_its_task_measures_nothing(directory, tmp_path):
    of = board_settings({**BOARD, "tasks": ["arc"], "task_dir": str(directory)})
    with pytest.raises(UsageError, match=r"Expected a task of .*, got 'arc'"):
        app.bench(of, tmp_path / "board")
    assert not (tmp_path / "board").exists()
