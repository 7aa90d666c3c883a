"""The whole way on the embedded model, from settings to an export that loads; and what happens to bad input."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from secateur.pruners.models.loading import find_checkpoint
from secateur.search import app
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UsageError
from secateur.search.results.pick import parse_bounds
from secateur.search.results.targets import best_by_target, target_sparsities
from secateur.search.settings.settings import settings_from

EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [128, 512], "test_tokens": 512}
SMALL = {
    "space": {"metric": "wanda", "granularity": "sublayer", "target": [0.4, 0.6]},
    "controller": {"kind": "evolution", "offspring": 4},
    "evaluator": EVALUATOR,
    "objectives": ["loss", "sparsity"],
    "budget": {"evaluations": 16},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "small"
    app.run(directory, **SMALL)
    return directory


def lines(directory: Path) -> list[dict[str, object]]:
    """Measurements without what differs from one machine to the next."""
    rows = [json.loads(line) for line in (directory / "measurements.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("candidate", "fidelity", "values", "tokens")} for row in rows]


# --- the way ---


def test_the_front_spans_the_targets_and_beats_or_equals_uniform(finished):
    run = app.open_run(finished)
    best = {round(t.measurement.values["sparsity"], 1): t for t in run.front()}
    assert set(best) == {0.0, 0.4, 0.6}
    for name in ("uniform@0.4", "uniform@0.6"):
        uniform = run.baselines[name].measurement.values
        assert best[round(uniform["sparsity"], 1)].measurement.values["loss"] <= uniform["loss"]
    assert run.baselines["dense"].measurement.values["kl"] < 1e-5


def test_the_front_and_the_baselines_are_measured_on_test_text_that_no_controller_saw(finished):
    run = app.open_run(finished)
    for trial in [*run.front(), *run.baselines.values()]:
        measured = run.test_of(trial)
        assert measured is not None
        assert measured.fidelity.text == "test:512"
    assert run.study.spent.evaluations == 16, "test measurements are not in the budget"


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize("calibration", ["dense", "sequential"])
def test_an_export_loads_and_is_what_was_searched(finished, tmp_path, calibration):
    run = app.open_run(finished)
    trial = run.pick(parse_bounds({"sparsity": "0.6"}))
    summary = run.export(trial, tmp_path / "model", calibration=calibration)
    searched, exported = (summary.measured[f"search:512, as {how}"]["kl"] for how in ("searched", "exported"))
    if calibration == "dense":
        assert exported == pytest.approx(searched, rel=1e-5), "the weights that the search measured"
    else:
        assert exported != pytest.approx(searched, rel=1e-5)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}, "as the parent is stored"
    manifest = json.loads((tmp_path / "model" / "secateur.json").read_text())
    assert manifest["candidate"] == trial.measurement.candidate
    for name, sparsity in run.allocation(trial).items():
        weight = weights[f"{name}.weight"]
        assert int((weight == 0).sum()) >= int(sparsity * weight.numel())
    assert run.export(trial, tmp_path / "model", calibration=calibration).already
    with pytest.raises(ValueError, match="Expected a new or empty directory to export to"):
        run.export(run.baselines["dense"], tmp_path / "model")
    found = app.evaluate(str(tmp_path / "model"), n_tokens=512, window=64)
    assert found["zeros"] == pytest.approx(0.6, abs=0.005)
    assert found["ce"] == pytest.approx(summary.measured["test:512, as exported"]["ce"], rel=1e-3)


@pytest.mark.usefixtures("forked_reload")
def test_a_damaged_export_and_what_a_killed_one_left_are_named(finished, tmp_path, secateur):
    left, model = tmp_path / ".model-killed__", tmp_path / "model"
    left.mkdir()
    (left / "export.lock").write_text(socket.gethostname())
    export = ("export", finished, "--sparsity", "0.6", "--to", model)
    verify = ("evaluate", model, "--verify", "--tokens", "512", "--window", "64", "--json")
    status, out, _ = secateur(*export)
    assert (status, out.splitlines()[-1]) == (0, f"removed {left}, left by a killed export")
    assert not left.exists()
    assert json.loads(secateur(*verify)[1])["verified_files"] >= 4
    assert "was exported before" in secateur(*export)[1]
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-64] + bytes(64))
    for command in (export, verify):
        status, out, err = secateur(*command)
        assert (status, out) == (2, "")
        assert "got model.safetensors missing or damaged. Remove the directory and export again." in err
        assert err.splitlines()[-1].startswith("secateur: error: Expected the files of ")
    status, _, err = secateur("evaluate", "tiny", "--verify")
    assert status == 2
    assert "Expected an export with its secateur.json, got tiny" in err


def test_a_longer_budget_goes_on_and_equals_one_long_search(finished, tmp_path):
    first = {**SMALL, "budget": {"evaluations": 9}}
    app.run(tmp_path / "run", **first)
    app.run(tmp_path / "run", **SMALL)
    searched = [
        [row for row in lines(d) if row["fidelity"] != "test:512"] for d in (tmp_path / "run", finished)
    ]
    assert searched[0] == searched[1]


@pytest.mark.parametrize(
    "kind", [kind for kind in CONTROLLERS if kind != "genetic"]
)  # that is for formulas alone
def test_every_controller_searches_a_real_model(kind, tmp_path):
    run = app.run(tmp_path / kind, **{**SMALL, "controller": {"kind": kind}, "budget": {"evaluations": 6}})
    assert len(run.trials()) >= 3


@pytest.mark.usefixtures("forked_reload")
def test_patterns_are_levels_of_zeros_in_each_group(tmp_path):
    space = {"granularity": "block", "target": 0.5, "group_size": 4, "metric": "sparsegpt"}
    run = app.run(tmp_path / "run", **{**SMALL, "space": space, "budget": {"evaluations": 6}})
    run.export(run.baselines["uniform@0.5"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name in run.allocation(run.front()[0]):
        groups = (weights[f"{name}.weight"] == 0).reshape(-1, 4).sum(1)
        assert groups.min() >= 2, name


def test_a_budget_that_ends_before_there_is_a_result_is_said(tmp_path):
    said: list[str] = []
    few = {**SMALL, "controller": {"kind": "sensitivity"}, "budget": {"evaluations": 4}}
    app.search(settings_from(few), tmp_path / "run", say=said.append)
    [warning] = [line for line in said if "budget.evaluations" in line]
    assert "4 ends before `sensitivity` has a result of its own: it needs about " in warning


def test_what_is_best_at_a_target_is_tested_where_the_loss_alone_is_searched(tmp_path):
    alone = {**SMALL, "controller": {"kind": "random"}, "objectives": ["loss"], "budget": {"evaluations": 6}}
    run = app.run(tmp_path / "run", **alone)
    assert [trial.measurement.candidate for trial in run.front()] == [
        run.baselines["dense"].measurement.candidate
    ]
    best = best_by_target(run.trials(), target_sparsities(run.baselines))
    assert len(best) == 2
    assert all(run.test_of(trial) for trial in best.values())


# --- killed and continued ---


def test_a_search_that_is_killed_ends_with_the_trials_of_an_unbroken_one(finished, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps(SMALL))  # JSON is YAML
    command = [
        sys.executable,
        "-m",
        "secateur.search.cli",
        "search",
        str(settings),
        "--run",
        str(tmp_path / "run"),
    ]
    journal = tmp_path / "run" / "measurements.jsonl"
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 5):
        assert victim.poll() is None, victim.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    measured = journal.read_bytes().splitlines()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().splitlines()[: len(measured)] == measured, "nothing that was measured is lost"
    assert lines(tmp_path / "run") == lines(finished)


# --- bad input: one line that says what was expected, what came, what to do; the run is not touched ---


def refused(tmp_path: Path, match: str, **changes: object) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        app.search(settings_from({**SMALL, **changes}), tmp_path / "never")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()


def test_wrong_settings(tmp_path):
    refused(tmp_path, r"Did you mean 'budget'\?", budgett={})
    refused(tmp_path, r"within \[0, 1\], got 1.5", space={"target": 1.5})
    refused(tmp_path, r"Expected `target` from 0 to 0.5 ", space={"target": 0.7, "max_sparsity": 0.5})
    refused(tmp_path, r"Did you mean 'wanda'\?", space={"metric": "wandaa"})
    refused(tmp_path, r"Expected `space.group_size` to divide", space={"group_size": 5, "max_sparsity": 0.8})


def test_wrong_texts(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("".join(f"Line {i}.\n" for i in range(200)))
    for name, match in (
        ("missing.txt", "missing.txt"),
        ("empty.txt", "Expected text in `data"),
        ("short.txt", r"Expected at least \d+ tokens in `data"),
    ):
        parts = dict.fromkeys(("calibration", "search", "test"), str(tmp_path / name))
        refused(tmp_path, match, evaluator={**EVALUATOR, "data": parts})


def test_wrong_models(tmp_path):
    (tmp_path / "no-model").mkdir()
    refused(tmp_path, "config.json", model=str(tmp_path / "no-model"))
    refused(tmp_path, r"Did you mean 'tiny'\?", model="tinny")
    torch.manual_seed(0)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    refused(tmp_path, "Expected", model=str(tmp_path / "bert"))
    embedded = Path(find_checkpoint("tiny").location)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in embedded.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(
            content[: len(content) // 2] if "safetensors" in file.name else content
        )
    refused(tmp_path, "model.safetensors", model=str(broken))


def test_a_run_of_another_search_is_refused_with_the_difference(finished):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.iterdir() if path.name != "run.lock")
    other = {**SMALL, "space": {**SMALL["space"], "metric": "magnitude"}}
    with pytest.raises(UsageError, match=r"space.metric: wanda -> magnitude"):
        app.search(settings_from(other), finished)
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.iterdir() if p.name != "run.lock") == before


def test_a_bound_that_no_trial_meets_names_the_nearest(finished):
    with pytest.raises(UsageError, match=r"The nearest is trial \d+ with sparsity 0\.(6|59)"):
        app.open_run(finished).pick(parse_bounds({"sparsity": "0.9"}))


def test_a_full_disk_is_said_in_one_line_and_the_search_goes_on_later(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match=r"Expected .* MB of room .* run the same command"):
            app.search(settings_from(SMALL), tmp_path / "run")
    assert app.search(settings_from(SMALL), tmp_path / "run").spent.evaluations == 16
