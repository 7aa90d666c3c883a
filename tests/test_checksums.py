"""Checksums: of measurements, which readers then need not parse, and of stored tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.search.errors import UsageError
from secateur.search.results.run import Run, open_run
from secateur.search.study.checksum import checksum_path, n_unchanged
from secateur.search.study.study import MEASUREMENTS, Study
from secateur.spaces.measurement import Fidelity, Measurement
from tests.runs import make_run
from tests.toy import measurement, start

# --- measurements ---


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run", 6).study.directory


def test_a_reader_parses_the_lines_that_are_not_as_their_driver_wrote_them(run, monkeypatch):
    parsed: list[int] = []
    monkeypatch.setattr(Run, "candidate", lambda self, trial: parsed.append(trial.number))
    n_trials = len(open_run(run).study.trials)
    assert parsed == []  # all are as they were written
    path = run / MEASUREMENTS
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[-1].replace("test:1024", "test:2048") + "\n")
    open_run(run)
    assert parsed == [n_trials]
    parsed.clear()
    checksum_path(path).unlink()
    open_run(run)
    assert len(parsed) == len({t.measurement.candidate for t in Study.open(run).trials})  # each text once


def test_a_line_that_nobody_shows_is_named_by_every_command(secateur, run):
    worst = Measurement("zz", Fidelity("search", 1024), infeasible="none of the space", worker="w")
    path = run / MEASUREMENTS
    with path.open("a") as file:
        file.write(json.dumps(worst.to_json()) + "\n")
    n_lines = path.read_text().count("\n")
    for command in (["front"], ["pick", "--sparsity", "0.3"], ["status"], ["report"]):
        code, _, err = secateur(command[0], run, *command[1:])
        assert code == 2
        assert f"in line {n_lines} of {path}, got 'zz'" in err


def test_the_checksum_covers_what_drivers_wrote_one_after_the_other(tmp_path):
    path = tmp_path / MEASUREMENTS
    for number in range(3):
        with start(tmp_path) as study:
            study.append([measurement(number)])
        data = path.read_bytes()
        assert n_unchanged(path, data) == len(data)
        assert Study.open(tmp_path).n_unchanged == number + 1
    assert n_unchanged(path, data.replace(b"c1", b"c7")) == 0
    assert n_unchanged(path, data + b"{}\n") == len(data)
    assert n_unchanged(path, data[:-1]) == 0
    with start(tmp_path) as study, path.open("ab"):
        assert study.n_unchanged == 3


@pytest.mark.parametrize(
    "content", ["", "[]", '{"bytes": 1e9, "sha256": 3}', '{"bytes": -1, "sha256": ""}', "\xff"]
)
def test_a_damaged_checksum_is_none(run, content):
    checksum_path(run / MEASUREMENTS).write_text(content)
    assert open_run(run).study.n_unchanged == 0


def test_a_text_of_endless_runs_is_refused_at_once(run):
    view = open_run(run)
    for text in (
        "allocation:" + ",".join(["1x999999", "2x999999"] * 500),
        "allocation:1x1",
        "allocation:01x6",
    ):
        with pytest.raises(ValueError, match="Expected an allocation such as"):
            view.space.parse(text)
    with pytest.raises(UsageError):
        open_run(run / "nowhere")
