"""Importance and repair that the settings leave to the model: obs where it fits, and what a run began with for good."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from secateur.pruners.structure import pruner
from secateur.search import app
from secateur.search.results.run import open_run
from secateur.search.settings.settings import settings_from

OLD = Path(__file__).parent / "old_runs" / "architecture"


def settings(**space):
    return settings_from(
        {
            "model": "tiny",
            "space": {"kind": "architecture", "target": 0.3, **space},
            "controller": {"kind": "random"},
            "evaluator": {"window": 64, "calibration_tokens": 256, "fidelities": [64], "test_tokens": 64},
            "budget": {"evaluations": 6},
        }
    )


def chosen(directory: Path) -> tuple[str, str]:
    stored = yaml.safe_load((directory / "settings.yaml").read_text(encoding="utf-8"))["space"]
    return stored["importance"], stored["repair"]


def search(of, directory: Path) -> list[str]:
    said: list[str] = []
    app.search(of, directory, say=said.append)
    return [line for line in said if line.startswith("chosen for this model")]


def test_obs_is_the_default_and_is_written_down(tmp_path):
    assert search(settings(), tmp_path / "run") == ["chosen for this model: importance obs, repair obs"]
    assert chosen(tmp_path / "run") == ("obs", "obs")
    assert search(settings(importance="flap", repair="none"), tmp_path / "other") == []
    assert chosen(tmp_path / "other") == ("flap", "none")
    of = {"refit": "obs", "bias": "wanda_sp"}  # an order for updated weights, or for weights as they are
    for repair, importance in of.items():
        said = search(settings(repair=repair), tmp_path / repair)
        assert said == [f"chosen for this model: importance {importance}"]


def test_where_memory_is_short_it_is_what_needs_none_and_a_run_keeps_it(tmp_path, monkeypatch):
    widest = 384  # channels of the embedded model's MLPs
    needed = 6 * 8 * widest**2
    for left, expected in ((needed, ("wanda_sp", "none")), (needed + 1, ("obs", "obs"))):
        monkeypatch.setattr(pruner, "available_bytes", lambda device, left=left: left)
        search(settings(), tmp_path / str(left))
        assert chosen(tmp_path / str(left)) == expected
    assert search(settings(), tmp_path / str(needed)) == [], "nothing is left to choose"
    assert chosen(tmp_path / str(needed)) == ("wanda_sp", "none")


def test_whole_sub_layers_need_no_order(tmp_path):
    search(settings(units=["attention", "mlp"], baselines=[]), tmp_path / "run")
    assert chosen(tmp_path / "run") == ("wanda_sp", "none")


def test_a_run_from_before_goes_on_with_settings_that_say_nothing(tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(OLD, directory)
    stored = open_run(directory).study.settings
    before = stored["space"]["importance"], stored["space"]["repair"]
    silent = {key: value for key, value in stored["space"].items() if key not in ("importance", "repair")}
    n_done = stored["budget"]["evaluations"]
    app.search(settings_from({**stored, "space": silent, "budget": {"evaluations": n_done + 1}}), directory)
    assert chosen(directory) == before
    assert before[0] == "wanda_sp"
