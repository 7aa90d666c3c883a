"""Code and paths in task files: refused, or run in a sandbox."""

from __future__ import annotations

import pytest

from secateur.evaluators.tasks.task_set import TaskPlan, TaskSet
from secateur.search import app
from secateur.search.errors import UsageError
from tests.tasks import DOCS, TASK, task_settings

INTERNALS = "{{ cycler.__init__.__globals__.os.system('touch ran') }}"
HIDDEN = "{{ cycler['__in' ~ 'it__']['__glo' ~ 'bals__'].os.system('touch ran') }}"


@pytest.fixture
def altered(task_directory, tmp_path, monkeypatch):
    """Writes a copy of the task with one piece of it replaced, and gives its directory, which is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(old, new, name="piqa-local.yaml"):
        (tmp_path / "piqa.jsonl").write_text((task_directory / "piqa.jsonl").read_text())
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
        app.run(tmp_path / "run", **task_settings(where, model="nowhere"))
    assert not (where / "ran").exists()
    plan = TaskPlan(("piqa-local",), where, trusted=True)
    TaskSet(plan, tiny.model, tiny.tokenizer)
    assert (where / "ran").exists()


@pytest.mark.parametrize(
    "rendered", ["{{goal}}", "{% if goal == 'what is pass for?' %}" + HIDDEN + "{% endif %}"]
)
def test_templates_are_rendered_in_a_sandbox(altered, tiny, rendered):
    where = altered('"Question: {{goal}}\\nAnswer:"', f'"{rendered}"')
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
