"""The script that checks a GPU, on a CPU with small shapes: every part runs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def check(*arguments, env=None):
    return subprocess.run(
        [ROOT / "scripts" / "device-check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def test_every_part_runs_on_small_shapes(tmp_path):
    done = check("--small", "--device", "cpu", "--minutes", "30", "--out", str(tmp_path / "device.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "device.json").read_text())
    rows = {row["part"]: row for row in found["rows"]}
    assert not [row for row in rows.values() if row["error"]]
    assert found["hardware"] == "cpu"
    assert rows["equality: space allocation"]["values"]["largest relative difference"] == 0.0
    assert rows["equality: metrics and updates"]["values"] == {"sparsegpt": 0.0, "wanda": 0.0}
    assert abs(rows["statistics and masks, Wanda"]["values"]["share kept"] - 0.5) < 1e-3
    assert rows["candidates"]["values"]["tokens/s"] > 0
    side_by_side = rows["candidates side by side"]["values"]
    assert [name for name, x in side_by_side.items() if name.startswith("ratio") and x > 0] == [
        "ratio, 4 tokens",
        "ratio, 64 tokens",
    ]
    assert max(x for name, x in side_by_side.items() if "difference" in name) <= 0.02
    assert rows["latency table"]["values"]["decode, ms"] > 0
    assert rows["latency table"]["values"]["decode@8, ms"] > 0
    if shutil.which("g++"):
        assert rows["candidates, compiled"]["values"]["largest relative difference"] <= 0.02
    assert rows["forecast"]["values"]["foreseen GB of a search"] > 0
    for part in rows:
        assert part in done.stdout


def test_what_is_over_time_is_skipped_and_said_so(tmp_path):
    done = check("--small", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path / "device.json"))
    assert done.returncode == 0
    rows = json.loads((tmp_path / "device.json").read_text())["rows"]
    assert {row["error"] for row in rows} == {"skipped: the time is over"}
    assert done.stdout.count("skipped: the time is over") == len(rows)
    assert all(row["met"] is None for row in rows)


def test_a_missing_package_is_named_before_anything_begins(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    done = check("--small", env={"PYTHON": str(bare)})
    assert done.returncode == 2
    assert "Expected the package torch, got none" in done.stderr


def test_without_a_gpu_the_large_shapes_are_refused(tmp_path):
    done = check("--device", "cpu", "--out", str(tmp_path / "device.json"))
    assert done.returncode == 2
    assert "Expected a GPU, got none. Add --small" in done.stderr


@pytest.fixture
def device(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "experiments" / "007-large")
    import device  # a script of an experiment

    return device


def run_parts(device, parts, tmp_path):
    rows, out = [], tmp_path / "device.json"
    checked = device.Checked(torch.device("cpu"), tmp_path, small=True)
    device.run_parts(
        parts, checked, rows, math.inf, lambda: device.write(out, device.facts(checked.device, True), rows)
    )


def test_a_part_that_fails_or_is_killed_loses_no_other_result(device, tmp_path, capsys):
    def good(row):
        row.values["s"] = 1.0

    def bad(row):
        raise RuntimeError("out of memory")

    def killed(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parts(device, {"one": good, "two": bad, "three": good, "four": killed, "five": good}, tmp_path)
    found = json.loads((tmp_path / "device.json").read_text())
    assert [(x["part"], x["values"], x["error"]) for x in found["rows"]] == [
        ("one", {"s": 1.0}, ""),
        ("two", {}, "RuntimeError: out of memory"),
        ("three", {"s": 1.0}, ""),
    ]
    assert found["hardware"] == "cpu"
    assert "two" in capsys.readouterr().out


def test_some_parts_are_chosen_by_words_with_those_that_they_need(device):
    parts = dict.fromkeys(
        ["equality: space masks", "17 levels", "candidates", "candidates, compiled", "forecast"]
    )
    assert [*device.chosen(parts, None)] == [*parts]
    assert [*device.chosen(parts, "compiled")] == ["17 levels", "candidates", "candidates, compiled"]
    assert [*device.chosen(parts, "forecast, masks")] == ["equality: space masks", "forecast"]
    with pytest.raises(
        ValueError, match=r"Expected `--parts` out of: equality: space masks; 17 levels; .*'level 3'"
    ):
        device.chosen(parts, "level 3")


def test_the_help_needs_torch_alone_and_names_everything(tmp_path):
    done = check("--help")
    assert done.returncode == 0
    for option in ("--pack", "--small", "--minutes", "--parts", "--out"):
        assert option in done.stdout


def test_packages_of_another_python_are_refused_before_anything_begins(tmp_path):
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "device-check", root / "scripts")
    (root / "build" / "device-packages").mkdir(parents=True)
    (root / "build" / "device-packages" / "python-version").write_text("2.7\n")
    done = subprocess.run(
        [root / "scripts" / "device-check", "--small"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("scripts/device-check: Expected Python 2.7, which build/device-packages")
    assert len(done.stderr.splitlines()) == 1
