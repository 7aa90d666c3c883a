"""Searches over recipes: measured as they are exported, on any worker, and shown in words."""

from __future__ import annotations

import json
import math
from io import StringIO
from shutil import copytree

import pytest
from rich.console import Console

from secateur.evaluators.session import Session
from secateur.evaluators.worker_setup import worker_setup
from secateur.pruners.calibration.collected import gram_bytes
from secateur.pruners.export.manifest import MANIFEST
from secateur.pruners.models import memory
from secateur.pruners.models.discover import dissect
from secateur.pruners.recipes.checks import check_family
from secateur.search import app
from secateur.search.app.recipe_file import known_recipe
from secateur.search.app.session import plan
from secateur.search.errors import UsageError
from secateur.search.executors.cluster.staging import describe
from secateur.search.settings.settings import settings_from
from secateur.search.show.front_table import as_table, front_rows
from secateur.search.show.report import write_report
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.settings import RecipeSettings
from tests.models import count_zeros
from tests.structures import CONFIGS, build

EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [128, 256], "test_tokens": 256}
FEW = {"samples": [2, 4], "length": [32, 64], "pool_tokens": 2048, "subsets": 2, "known": []}
SPACES = {
    "weights": {"metrics": ["blend", "wanda", "sparsegpt"], "target": 0.5},
    "structure": {"metrics": ["blend", "flap", "obs"], "target": 0.2},
    "blocks": {"metrics": ["shortgpt", "last"], "target": 0.17},
}


def settings(unit="structure", **changes):
    space = {"kind": "recipe", "unit": unit, **FEW, **SPACES[unit], **changes.pop("space", {})}
    raw = {"space": space, "evaluator": EVALUATOR, "budget": {"evaluations": 5}}
    return settings_from({**raw, "controller": {"kind": "evolution", "offspring": 2}, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished search of each unit."""
    found = {}
    for unit in SPACES:
        directory = tmp_path_factory.mktemp(unit) / "run"
        app.search(settings(unit), directory)
        found[unit] = app.open_run(directory)
    return found


def best(run):
    return min(
        (t for t in run.trials() if t.measurement.values["sparsity"]),
        key=lambda t: t.measurement.values["loss"],
    )


@pytest.mark.parametrize("unit", ["weights", "blocks"])
def test_what_is_pruned_for_good_is_what_was_measured(runs, unit):
    run = runs[unit]
    trial, session = best(run), Session(plan(run.settings))
    data = session.data()
    data.of(run.fidelity)
    candidate = session.space.parse(trial.measurement.candidate)
    costs = session.pruner.cost(candidate)
    session.pruner.prune(session.space.config(candidate), sequential=False)
    values = trial.measurement.values
    assert data.live_losses(run.fidelity)["kl"] == pytest.approx(values["kl"], rel=1e-5)
    assert costs == {name: values[name] for name in costs}
    n_params = sum(parameter.numel() for parameter in session.loaded.model.parameters())
    assert values["params"] == n_params - sum(count_zeros(session.anatomy).values())


@pytest.mark.usefixtures("forked_reload")
def test_what_is_exported_is_what_was_measured(runs, tmp_path):
    run = runs["structure"]
    trial = best(run)
    summary = run.export(trial, tmp_path / "model")
    searched, exported = (summary.measured[f"search:256, as {how}"] for how in ("searched", "exported"))
    assert exported["kl"] == pytest.approx(searched["kl"], rel=1e-5)
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert manifest["method"]["calibration"] == "dense"
    assert Recipe.of(manifest["method"]["recipe"]).text == trial.measurement.candidate
    assert manifest["parameters"]["saved"] == trial.measurement.values["params"]
    assert all(block.keys() == {"kv_groups", "ffn"} for block in manifest["indices"].values())
    assert run.export(trial, tmp_path / "model").already


def test_a_search_that_goes_on_uses_what_is_there_and_proposes_the_same(runs, tmp_path):
    first = runs["structure"]
    directory = first.study.directory
    known = [(t.measurement.candidate, t.measurement.fidelity) for t in first.study.trials]
    pools = (directory / "levels" / "pools.safetensors").stat().st_mtime_ns
    app.search(settings(budget={"evaluations": 7}), directory)
    again = app.open_run(directory)
    assert [(t.measurement.candidate, t.measurement.fidelity) for t in again.study.trials][
        : len(known)
    ] == known
    assert len(again.study.trials) > len(known)
    assert (directory / "levels" / "pools.safetensors").stat().st_mtime_ns == pools


def test_a_worker_elsewhere_measures_the_same(runs, tmp_path):
    """What workers are told suffices, and statistics are no part of it."""

    run = runs["structure"]
    levels = run.study.directory / "levels"
    assert (levels / ".statistics").is_dir()
    assert {file.name for file in describe(levels).files} == {"pools.safetensors"}
    session = Session(plan(run.settings))
    setup = worker_setup(session, tmp_path / "kit", levels, threads=1, spread=False)
    model, windows, _ = setup.directories
    there = copytree(levels, tmp_path / "there", ignore=lambda directory, names: [".statistics"])
    trial = best(run)
    (measured,) = setup([model, windows, there]).evaluate([trial.measurement.candidate], run.fidelity)
    assert measured.values == pytest.approx(trial.measurement.values, rel=1e-5)


def test_recipes_are_shown_in_words(runs):

    run = runs["structure"]
    out = StringIO()
    Console(file=out, width=160).print(as_table(run, front_rows(run)))
    for words in ("recipe: structure 0.2", "calibration calibration:1", "metric ", "allocation ", "repair "):
        assert words in out.getvalue()
    page, *pictures = write_report(run, best(run))
    assert "choose: " in page.read_text()
    assert "candidate.png" not in {picture.name for picture in pictures}
    assert run.allocation(best(run)) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["wanda"]}, "`space.metrics`: Expected a known `metric`"),
        ({"sources": {"other": "docs", "same": "{test}"}}, "Expected disjoint texts"),
        (
            {"profile": "nowhere.yaml", "allocations": ["profile"]},
            "Expected `profile` to be a YAML or JSON file",
        ),
        ({"samples": [999], "length": [64], "pool_tokens": 999 * 64}, "windows of 64 tokens"),
    ],
)
def test_settings_that_cannot_be_are_named_before_the_search(tmp_path, changes, message):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text about nothing.\n" for i in range(3000)))
    data = {"calibration": "docs", "search": "docs", "test": str(text)}
    changes = json.loads(json.dumps(changes).replace("{test}", str(text)))
    wrong = settings(space=changes, evaluator={**EVALUATOR, "data": data})
    with pytest.raises(UsageError, match=message):
        app.search(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("space", "needed"),
    [
        ({"search": ["metric"], "metrics": ["blend", "wanda_sp"]}, "gradients"),
        ({"search": ["repair"], "repairs": ["none", "refit"]}, "gram"),
        ({"search": ["metric", "repair"], "metrics": ["blend"], "repairs": ["obs"]}, "both"),
        ({"search": ["metric"], "metrics": ["wanda_sp"], "known": ["ziplm"]}, "gram"),
    ],
)
def test_a_cache_that_does_not_hold_one_choice_is_named_before_the_search(tmp_path, space, needed):
    anatomy = app.open_session(settings()).anatomy
    n_bytes = {
        "gradients": (4 + 4) * sum(linear.n_weights for linear in anatomy.linears),  # signed ones and squares
        "gram": gram_bytes(anatomy),
    }
    n_bytes["both"] = max(n_bytes.values())  # one after the other
    gb = math.ceil(n_bytes[needed] / 1e6) / 1e3
    with pytest.raises(UsageError, match=rf"`space.cache_gb` >= {gb:g} for the statistics.*got 1e-05"):
        app.search(settings(space={"metrics": None, "cache_gb": 1e-5, **space}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "space", "message"),
    [
        ("opt", {"unit": "weights", "start": "sparsellm"}, r"gate, up and down for sparsellm, got up, down"),
        ("opt", {"unit": "weights", "metrics": ["wanda", "sparsellm"]}, "for sparsellm"),
        ("gemma2", {"repairs": ["none", "kprune"]}, "to the stream as they are for the repair kprune"),
        ("gemma2", {"start": "kprune", "search": ["calibration"]}, "for the repair kprune"),
        (
            "opt",
            {"start": "sheared_2_7b", "search": ["calibration"]},
            "without a bias for gates of blocks and hidden",
        ),
        (
            "gemma2",
            {"start": "sheared_1_3b", "search": ["calibration"]},
            "to the stream as they are for gates of",
        ),
    ],
)
def test_methods_that_the_family_lacks_are_named_before_the_search(family, space, message):
    anatomy = dissect(build(CONFIGS[family]))
    with pytest.raises(ValueError, match=message):
        check_family(RecipeSettings(**space), anatomy)
    check_family(RecipeSettings(unit=space.get("unit", "structure"), known="all"), anatomy)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("opt", "sparsellm", "for sparsellm, got up, down"),
        ("gemma2", "kprune_tuning", "for the repair kprune"),
        (
            "opt",
            "sheared_2_7b",
            "without a bias for gates of blocks and hidden channels, got one at .* both at 0",
        ),
        ("opt", "sheared_1_3b", "without a bias for gates of blocks"),
        (
            "gemma2",
            "sheared_2_7b",
            "to the stream as they are for gates of blocks and hidden channels, got gemma2",
        ),
    ],
)
def test_a_recipe_that_the_family_lacks_is_named_before_it_is_run(family, name, message):
    anatomy = dissect(build(CONFIGS[family]))
    with pytest.raises(ValueError, match=message):
        known_recipe(name, 0.5).check_model(anatomy)
    known_recipe("wanda", 0.5).check_model(anatomy)
    known_recipe("sheared", 0.5).check_model(anatomy)  # without gates that the family can't have


def test_gradients_that_memory_does_not_hold_are_named_before_the_search(tmp_path, monkeypatch):

    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(UsageError, match=r"GB of memory for gradients of windows of 64 tokens"):
        app.search(settings(), tmp_path / "run")


def test_statistics_are_the_dense_models_whatever_is_asked_for(runs, tmp_path):
    with pytest.raises(UsageError, match="`--calibration dense` with the space recipe"):
        runs["structure"].export(best(runs["structure"]), tmp_path / "model", calibration="sequential")
