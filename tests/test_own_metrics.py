"""Metrics of one's own: by the path of a function, registered in Python, and what depends on their source."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.pruners.weights.method import Method
from secateur.search import app
from secateur.search.app.method_sources import method_sources
from secateur.search.errors import UsageError
from secateur.search.results.run import open_run
from secateur.search.settings.settings import load_settings
from secateur.spaces import plugins
from secateur.spaces.method import MethodRow
from secateur.spaces.methods import METRICS, REGISTERED, is_path, metrics_of
from secateur.spaces.own_metrics import HeldMethod, held_methods, hold, register_metric
from secateur.spaces.source import source_sha256

SOURCE = '''"""Wanda, with a power."""

import torch

POWER = 1.5


def helper(norm):
    return norm**POWER


def score(weight, inputs, generator):
    """Weight times input norm."""
    return weight.abs().float() * helper(inputs.norm)


def unused():
    return 1
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes and imports the module `mine_of_a_test`, a new one each time."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def call(source: str = SOURCE):
        (tmp_path / "mine_of_a_test.py").write_text(source)
        sys.modules.pop("mine_of_a_test", None)
        importlib.invalidate_caches()
        plugins.resolve.cache_clear()
        return importlib.import_module("mine_of_a_test")

    yield call
    sys.modules.pop("mine_of_a_test", None)
    plugins.resolve.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


# --- the hash of a source ---


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight.abs().float() *", "weight.abs().float() +"),
        ("POWER = 1.5", "POWER = 2.5"),
        ("return norm**POWER", "return norm**POWER + 1"),
        ("inputs.norm)", "torch.log(inputs.norm))"),
        ("def score(", "@staticmethod\ndef score("),
    ],
)
def test_what_a_function_uses_in_its_module_changes_its_hash(write, old, new):
    before = source_sha256(write().score)
    assert source_sha256(write(SOURCE.replace(old, new)).score) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Weight times input norm.", "Something else."),
        ("def helper(norm):", "def helper(norm):  # a comment"),
        ("def helper(norm):", "def helper(norm: float) -> float:"),
        ("    return 1\n", "    return 2\n"),
        ("\n\n\ndef unused", "\n\n\n\n\ndef unused"),
    ],
)
def test_what_changes_no_value_changes_no_hash(write, old, new):
    before = source_sha256(write().score)
    assert source_sha256(write(SOURCE.replace(old, new)).score) == before


def test_closures_and_values_count_and_recursion_ends():
    def make(power):
        def score(weight, inputs, generator):
            return weight**power if power else score(weight, inputs, generator)

        return score

    assert source_sha256(make(2)) == source_sha256(make(2))
    assert source_sha256(make(2)) != source_sha256(make(3))
    assert source_sha256((1, 2.5, "a")) != source_sha256((1, 2.5, "b"))


def test_hashes_are_the_same_in_another_process():
    code = "from secateur.spaces.methods import METHODS; print(*(row.source for row in METHODS.values()))"
    found = [
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env
        ).stdout
        for env in ({**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2"))
    ]
    assert found[0] == found[1]
    assert len(set(found[0].split())) > 30


# --- by path ---


def test_a_path_names_a_metric_wherever_one_is_named(write):
    write()
    name = "mine_of_a_test:score"
    row = METRICS[name]
    assert (row.needs, row.comparison, row.function.__name__) == ("moments", "output", "score")
    assert name in metrics_of("weights")
    assert name not in [*METRICS], "tables list what is known without it"
    assert Method(name).needs == "moments"
    assert load_settings(None, [f"space.metric={name}"]).space.metric == name
    assert not is_path("formula: abs(W) * X")
    assert not is_path("formula:W")


def test_a_path_may_name_a_row_with_what_it_needs(write):
    module = write(
        SOURCE
        + "\nfrom secateur.spaces.methods import MethodRow\n"
        + 'ROW = MethodRow("own", "metric", "weights", "mine_of_a_test:score", "own", needs="gram")\n'
    )
    assert isinstance(module.ROW, MethodRow)
    assert METRICS["mine_of_a_test:ROW"].needs == "gram"
    assert METRICS["mine_of_a_test:ROW"].function is module.score


@pytest.mark.parametrize("name", ["no_such_module:f", "mine_of_a_test:absent", "mine_of_a_test:POWER"])
def test_a_path_that_leads_nowhere_is_one_line(write, name):
    write()
    with pytest.raises(ValueError, match=r"Expected `metric` to be a function") as caught:
        Method(name)
    assert "\n" not in str(caught.value)


SMALL = {
    "space": {"metric": "mine_of_a_test:score", "target": 0.5, "step": 0.25},
    "controller": {"kind": "uniform"},
    "evaluator": {"window": 128, "calibration_tokens": 256, "test_tokens": 256, "fidelities": [256]},
}


def test_a_search_by_path_is_exported_by_the_command_and_refused_once_its_source_has_changed(write, tmp_path):
    write()
    directory = tmp_path / "run"
    run = app.run(directory, **SMALL)
    key = "source of metric/weights/mine_of_a_test:score"
    assert run.study.about.identity["content"][key] == source_sha256(sys.modules["mine_of_a_test"].score)
    store = json.loads((directory / "levels" / "store.json").read_text())
    trial = str(run.baselines["uniform@0.5"].number)
    command = [sys.executable, "-m", "secateur.search.cli", "export", str(directory), trial, "--json"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def export(to: str):
        env = {**os.environ, "PYTHONPATH": paths}
        words = [*command, "--to", str(tmp_path / to)]
        return subprocess.run(words, check=False, env=env, capture_output=True, text=True)

    done = export("model")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measured"]["search:256, as exported"]["kl"] > 0

    write(SOURCE.replace("POWER = 1.5", "POWER = 3.0"))
    with pytest.raises(UsageError, match="source of metric/weights/mine_of_a_test:score") as caught:
        app.run(directory, **SMALL)
    assert "\n" not in str(caught.value)
    refused = export("other")
    assert refused.returncode == 2
    assert "source of metric/weights/mine_of_a_test:score" in refused.stderr

    other = app.run(tmp_path / "other", **SMALL)
    losses = [x.baselines["uniform@0.5"].measurement.values["loss"] for x in (run, other)]
    assert losses[0] != losses[1]
    assert json.loads((tmp_path / "other" / "levels" / "store.json").read_text())["digest"] != store["digest"]


def test_a_run_from_before_sources_were_recorded_goes_on(write, tmp_path):
    write()
    directory = tmp_path / "run"
    app.run(directory, **SMALL)
    path = directory / "study.json"
    about = json.loads(path.read_text())
    content = about["identity"]["content"]
    about["identity"]["content"] = {
        name: x for name, x in content.items() if not name.startswith("source of ")
    }
    path.write_text(json.dumps(about))
    write(SOURCE.replace("POWER = 1.5", "POWER = 3.0"))
    n_trials = len(open_run(directory).study.trials)
    assert len(app.run(directory, **SMALL).study.trials) == n_trials


# --- registered ---


def test_a_registered_name_is_recorded_as_the_path_that_other_processes_find(write):
    module = write(
        SOURCE
        + "\nfrom secateur.spaces.own_metrics import register_metric\n"
        + 'register_metric(score, name="powered", needs="gram", comparison="layer", summary="a power")\n'
    )
    assert METRICS["powered"].function is module.score
    settings = load_settings(None, ["space.metric=powered"])
    assert settings.space.metric == "mine_of_a_test:score"
    REGISTERED.clear()  # as in another process, which imports the module
    del sys.modules["mine_of_a_test"]
    plugins.resolve.cache_clear()
    row = METRICS[settings.space.metric]
    assert (row.needs, row.comparison, row.summary) == ("gram", "layer", "a power")
    assert Method(settings.space.metric).compares == "layer"


def test_a_function_without_a_path_is_held_and_sent_by_value():
    cloudpickle = pytest.importorskip("ray.cloudpickle")

    @register_metric(needs="nothing", comparison="layer")
    def small_first(weight, inputs, generator):
        return weight.abs().float()

    assert isinstance(METRICS["small_first"], HeldMethod)
    assert "small_first" in [*METRICS]
    assert load_settings(None, ["space.metric=small_first"]).space.metric == "small_first"
    (held,) = held_methods()
    sent = pickle.loads(cloudpickle.dumps(held))
    REGISTERED.clear()
    with pytest.raises(KeyError):
        METRICS["small_first"]
    hold((sent,))
    assert METRICS["small_first"].function.__name__ == "small_first"


def test_a_name_is_new_and_none_of_settings():
    for name in ("wanda", "sparsegpt", "a:b", " "):
        with pytest.raises(ValueError, match="Expected a new name"):
            register_metric(lambda weight, inputs, generator: weight, name=name)


def test_a_recipe_records_the_sources_of_what_it_may_use():
    settings = load_settings(None, ["space.kind=recipe", "space.unit=weights", "space.target=0.5"])
    sources = method_sources(settings)
    assert "source of metric/weights/wanda" in sources
    assert sources["source of metric/weights/wanda"] == METRICS["wanda"].source


RECIPE = {
    "space": {
        "kind": "recipe",
        "unit": "weights",
        "target": 0.5,
        "metrics": ["mine_of_a_test:score"],
        "known": ["magnitude"],
    },
    "controller": {"kind": "random"},
    "evaluator": {"window": 128, "calibration_tokens": 256, "test_tokens": 256, "fidelities": [256]},
    "budget": {"evaluations": 4},
}


def test_workers_of_a_cluster_find_it(write, tmp_path, ray_cluster):
    write()
    executor = {"kind": "ray", "workers": 1}
    run = app.run(Path(tmp_path / "run"), **RECIPE, executor=executor)
    found = [t.measurement for t in run.study.trials if "mine_of_a_test:score" in t.measurement.candidate]
    assert found
    assert [m.infeasible for m in found] == [None] * len(found)
    assert all(m.values["loss"] > 0 for m in found)
    assert {m.worker for m in found} != {"local"}
