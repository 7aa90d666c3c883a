"""A recipe as a file: written from a run, read with named errors, run on a model."""

from __future__ import annotations

import json

import pytest
import yaml

from secateur.pruners.export.manifest import MANIFEST
from secateur.search import app
from secateur.search.app.found import recipe_of, written
from secateur.search.app.recipe_file import RecipeFile, known_recipe, open_recipe
from secateur.search.cli import _dispatch
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.spaces.formulas.metric import needs_contrast
from secateur.spaces.recipe.known import KNOWN

SPACE = {
    "kind": "recipe",
    "unit": "weights",
    "target": 0.5,
    "metrics": ["blend", "wanda"],
    "repairs": ["bias"],
    "samples": [2],
    "length": [32],
    "choose": ["random"],
    "pool_tokens": 2048,
    "known": [],
}
EVALUATOR = {"window": 64, "calibration_tokens": 64, "fidelities": [128], "test_tokens": 128}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipes") / "run"
    raw = {
        "space": SPACE,
        "evaluator": EVALUATOR,
        "controller": {"kind": "random"},
        "budget": {"evaluations": 4},
    }
    app.search(settings_from(raw), directory)
    return app.open_run(directory)


def recipes(run):
    return [trial for trial in run.trials() if trial.measurement.values["sparsity"]]


@pytest.mark.usefixtures("forked_reload")
def test_a_recipe_of_a_run_prunes_as_the_run_did(run, tmp_path, capsys):
    trial = next(t for t in run.front() if t.measurement.values["sparsity"])
    file = tmp_path / "best.yaml"
    _dispatch(["recipe", str(run.study.directory), str(trial.number), "--to", str(file)])
    assert open_recipe(str(file)) == recipe_of(run, trial)
    assert yaml.safe_load(file.read_text())["sources"] == {"calibration": "docs"}
    capsys.readouterr()
    tokens = ["--tokens", "128", "--window", "64"]
    _dispatch(["prune", "tiny", "--recipe", str(file), "--to", str(tmp_path / "model"), *tokens, "--json"])
    found = json.loads(capsys.readouterr().out)
    measured = found["measured"]
    assert measured["test:128, dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert measured["test:128, as exported"]["kl"] == pytest.approx(run.test_of(trial).values["kl"], rel=1e-5)
    _check_zeros_and_biases(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"got tokenizer.json missing or damaged. Remove the directory"):
        _dispatch(["prune", "tiny", "--recipe", str(file), "--to", str(tmp_path / "model"), *tokens])


def _check_zeros_and_biases(directory):
    """Half of the weights are zeros, and what biases the repair added stock transformers loads."""
    config, manifest = (json.loads((directory / name).read_text()) for name in ("config.json", MANIFEST))
    assert config["attention_bias"] is config["mlp_bias"] is True
    assert sum(manifest["zeros"].values()) / sum(manifest["weights"].values()) == pytest.approx(0.5, abs=1e-6)
    assert manifest["label"].startswith("unstructured")
    assert not manifest["kept"]


def test_a_recipe_names_the_range_that_the_search_had(run):
    assert run.study.about.facts["sources"] == {"calibration": "docs"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.study.about.facts, "sources", {"calibration": "my.txt[0.0:0.3]"})
        assert recipe_of(run, recipes(run)[0]).sources == {"calibration": "my.txt[0.0:0.3]"}


def test_gradients_without_the_memory_for_them_are_refused_before_anything_is_measured(tmp_path):
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.pruners.models.memory.available_bytes", lambda device: 1 << 20)
        with pytest.raises(UsageError, match="gradients of windows of 128 tokens"):
            app.prune(known_recipe("llm_pruner_first", 0.2), "tiny", tmp_path / "model", say=said.append)
    assert said == ["loading tiny"]


def test_the_head_of_a_file_says_what_it_was_found_with(run):
    text = written(run, recipes(run)[0])
    assert f"loss {recipes(run)[0].measurement.values['loss']:.4f} on search:128" in text
    assert "wanda@0.5" in text


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_recipe_is_a_file(name, tmp_path):
    metric = KNOWN[name].form["metric"]
    second = needs_contrast(metric if isinstance(metric, str) else metric["name"], KNOWN[name].unit)
    file = known_recipe(name, 0.4, "somewhere", "elsewhere" if second else None)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(file.model_dump(mode="json")))
    assert open_recipe(str(path)) == file
    assert open_recipe(str(path), 0.3).recipe["sparsity"] == 0.3
    assert file.unit == KNOWN[name].unit


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "Expected a file with `recipe:`"),
        ({"recipe": {"unit": "weights", "sparsity": 0.5}}, "`sources`"),
        ({"recipe": {"unit": "words"}, "sources": {}}, "Expected `unit` to be one of"),
        ({"recipe": {"unit": "weights", "sparsity": 0.5}, "sources": {"other": "docs"}}, "'calibration'"),
        (
            {"recipe": {"unit": "blocks", "sparsity": 0.5, "repair": "bias"}, "sources": {}},
            "Expected `repair`",
        ),
        (
            {"recipe": {"unit": "weights", "sparsity": 0.5, "metric": "sparsegpt", "repair": "obs"}},
            "repair: none",
        ),
        ({"recipe": {"unit": "weights", "sparsity": 0.5}, "sources": {}, "sed": 1}, "sed"),
        (
            {"recipe": {"unit": "weights", "sparsity": 0.5, "allocation": "profile"}, "sources": {}},
            "the file that the rule profile follows, got none",
        ),
    ],
)
def test_files_that_are_no_recipes_are_named(tmp_path, raw, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UsageError, match=message):
        open_recipe(str(path))


def test_names_without_a_recipe_are_named(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'wanda'"):
        open_recipe("wandas", 0.5)
    with pytest.raises(UsageError, match="Expected `--sparsity`"):
        open_recipe("wanda")
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        open_recipe(str(tmp_path / "nowhere.yaml"))
    wanda = known_recipe("wanda", 0.5).model_dump()
    unknown = RecipeFile.model_validate({**wanda, "recipe": {**wanda["recipe"], "metric": "wnda"}})
    with pytest.raises(UsageError, match="Did you mean 'wanda'"):
        app.prune(unknown, "tiny", tmp_path)


def test_the_dense_model_is_no_recipe(tmp_path):
    from tests.runs import make_run

    view = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="Expected a pruned model, got trial 0, the dense one"):
        recipe_of(view, view.trials()[0])
