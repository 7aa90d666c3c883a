"""Latencies in settings, searches and the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from secateur.evaluators.latency.conditions import LatencySetup
from secateur.evaluators.latency.store import (
    TableSource,
)
from secateur.pruners.models.loading import find_checkpoint
from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.errors import UsageError
from secateur.search.results.pick import Bound
from secateur.search.settings.evaluator import LatencySettings
from secateur.search.settings.settings import identity, settings_from
from tests.models import small_llama
from tests.timing import VOCABULARY, CountingClock
from tests.toy import measurement


def test_a_search_looks_for_a_table_only_if_it_needs_one():
    assert plan(settings_from({})).latency is None
    assert plan(settings_from({"objectives": ["loss", "latency_decode"]})).latency == TableSource(
        LatencySetup()
    )
    controller = {"kind": "optuna", "objectives": ["loss", "latency_prefill"]}
    assert plan(settings_from({"controller": controller})).latency is not None
    section = {"prompt": 64, "threads": 1, "clock": "cpu", "table": "t.json"}
    asked = settings_from({"objectives": ["loss", "latency_decode"], "evaluator": {"latency": section}})
    assert plan(asked).latency == TableSource(LatencySetup(1, 64, 1, "cpu"), "t.json")


def test_defaults_are_those_of_the_command_and_older_studies_can_be_continued():
    defaults = LatencySettings().model_dump()
    assert defaults.pop("table") is None
    assert defaults | {"eager": False} == asdict(LatencySetup())
    assert LatencySettings(eager=True).model_dump()["eager"] is True
    assert {"latency", "tasks"}.isdisjoint(identity(settings_from({}))["evaluator"])


def test_bounds_on_latencies_may_be_relative():
    trial = SimpleNamespace(
        measurement=replace(measurement(0), values={"latency_decode": 14.0, "latency_prefill": 80.0})
    )
    dense = SimpleNamespace(
        measurement=replace(measurement(0), values={"latency_decode": 20.0, "latency_prefill": 100.0})
    )
    assert Bound.parse("max-latency", "0.7x").excess(trial, dense) == 0
    assert Bound.parse("max-latency", "0.6x").excess(trial, dense) == pytest.approx(2 / 12)
    assert Bound.parse("max-prefill", "0.08s").excess(trial, None) == 0


@pytest.fixture
def small(tmp_path):
    """Two equal models on the disk."""
    source = Path(find_checkpoint("tiny").location)
    for name in ("dense", "copy"):
        small_llama(n_layers=4, vocab_size=VOCABULARY).save_pretrained(tmp_path / name)
        for path in source.glob("tokenizer*"):
            shutil.copy(path, tmp_path / name)
    return str(tmp_path / "dense"), str(tmp_path / "copy")


def test_the_command_measures_a_table_and_compares_models(secateur, cache, monkeypatch, small):
    monkeypatch.setattr("secateur.evaluators.latency.table.clock_of", lambda device: CountingClock())
    monkeypatch.setattr("secateur.evaluators.latency.models.clock_of", lambda device: CountingClock())
    (dense, copy), how = small, ("--prompt", 16, "--threads", 1, "--rounds", 10)
    status, out, err = secateur("latency", dense, *how)
    assert status == 0, err
    assert "1 threads, batch 1, prompt 16; wall time, 10 rounds" in out
    (path,) = (cache / "latency").iterdir()
    assert str(path) in out
    status, out, _ = secateur("latency", dense, *how, "--json")
    assert json.loads(out) == json.loads(path.read_text())
    status, out, err = secateur("latency", copy, "--against", dense, *how, "--json")
    assert status == 0, err
    rows = json.loads(out)["phases"]["decode"]
    assert rows[copy]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows[dense]["predicted_ms"] == pytest.approx(rows[dense]["ms"])
    assert rows[copy]["predicted_ms"] is None
    status, out, _ = secateur("latency", copy, "--against", dense, *how)
    assert f"1.000x (1.000 to 1.000)  {copy}" in out
    assert f"ms, 1.000x  {dense}" in out


def test_a_run_keeps_the_table_that_it_began_with(cache, monkeypatch, small, tmp_path):
    monkeypatch.setattr("secateur.evaluators.latency.table.clock_of", lambda device: CountingClock())
    (model, _), run = small, tmp_path / "run"
    wanted = {
        "model": model,
        "space": {"kind": "architecture", "of": "latency_decode", "target": 0.3, "baselines": []},
        "controller": {"kind": "random"},
        "objectives": ["loss", "latency_decode"],
        "evaluator": {"window": 16, "calibration_tokens": 64, "fidelities": [32], "test_tokens": 16},
        "budget": {"evaluations": 4},
    }
    wanted["evaluator"]["latency"] = {"prompt": 16, "threads": 1}
    _, path = app.measure_latency(model, {"prompt": 16, "threads": 1})
    first = app.run(run, **wanted)
    dense = first.baselines["dense"].measurement.values["latency_decode"]
    blocks = 4 * 240 * 32
    assert dense == pytest.approx(5 + VOCABULARY * 32 + blocks)
    share = 1 - 0.3 * blocks / dense
    picked = first.pick([Bound.parse("max-latency", f"{share + 0.01}x")]).measurement.values
    assert picked["latency_decode"] / dense == pytest.approx(share, abs=0.01)
    path.unlink()
    wanted["budget"] = {"evaluations": 6}
    again = app.run(run, **wanted)
    assert len(again.trials()) == 6
    assert again.baselines["dense"].measurement.values["latency_decode"] == dense
    with pytest.raises(UsageError, match="secateur latency"):
        app.run(tmp_path / "another", **wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "--rounds", 2), "Expected `rounds` >= 10, got 2"),
        (("tiny", "--clock", "sun"), "Expected `clock` wall or cpu, got 'sun'"),
        (("tiny", "tiny"), "Expected one model for a table, got 2"),
        (("tiny", "--against", "tiny"), "Expected models to compare with tiny"),
        (("tiny", "--prompt", 4096), "Expected `prompt` < "),
    ],
)
def test_wrong_use_of_the_command_ends_with_2(secateur, cache, arguments, message):
    status, _, err = secateur("latency", *arguments)
    assert status == 2
    assert message in err


def test_a_search_without_a_table_is_refused_before_it_starts(cache, tmp_path):
    wanted = {
        "objectives": ["loss", "latency_decode"],
        "evaluator": {"window": 64, "calibration_tokens": 128},
    }
    wanted["evaluator"] |= {"fidelities": [64], "test_tokens": 64, "latency": {"prompt": 16, "threads": 1}}
    with pytest.raises(UsageError, match="secateur latency tiny --prompt 16 --threads 1"):
        app.run(tmp_path / "run", **wanted)
    assert not (tmp_path / "run").exists()


def test_an_objective_that_the_space_does_not_have_is_refused_before_it_starts(tmp_path):
    wanted = {"objectives": ["loss", "nodes"], "evaluator": {"window": 64, "calibration_tokens": 128}}
    wanted["evaluator"] |= {"fidelities": [64], "test_tokens": 64}
    with pytest.raises(UsageError, match="candidates of the space allocation have, got 'nodes'"):
        app.run(tmp_path / "run", **wanted)
    assert not (tmp_path / "run").exists()
