"""Wrong use and failures of the command: one line each, and its status."""

import errno

import pytest
import torch

from secateur.search.show import console
from tests.command import is_one_line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fronts", "{run}"], "front"),
        (["front"], "RUN"),
        (["front", "{run}", "--jsn"], "--json"),
        (["front", "{nowhere}"], "study.json"),
        (["pick", "{run}"], "max-params"),
        (["pick", "{run}", "--max-params", "few"], "90M"),
        (["pick", "{run}", "--sparsity", "0.99"], "nearest is trial"),
        (["report", "{run}", "3", "--sparsity", "0.3"], "both"),
        (["report", "{run}", "999"], "999"),
        (["export", "{run}", "3", "--to", "{nowhere}", "--calibration", "some"], "sequential"),
        (["list", "metric"], "metrics"),
        (["search", "{nowhere}.yaml"], "nowhere.yaml"),
        (["search", "--run", "{nowhere}", "-o", "budgt.tokens=1"], "budget"),
        (["search", "--run", "{nowhere}", "-o", "space.target=1.5"], "[0, 1]"),
        (["search", "--run", "{nowhere}", "-o", "seed"], "budget.evaluations=600"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(secateur, made, tmp_path, words, said):
    nowhere = tmp_path / "nowhere"
    before = (made.study.directory / "measurements.jsonl").read_bytes()
    status, out, err = secateur(*(w.format(run=made.study.directory, nowhere=nowhere) for w in words))
    assert (status, out) == (2, "")
    assert is_one_line(err)
    assert said in err
    assert not nowhere.exists()
    assert (made.study.directory / "measurements.jsonl").read_bytes() == before


class RoomError(ValueError):
    """As other rooms have them."""

    __module__ = "secateur.evaluators.data.sources"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RoomError("A text\nthat is too short."), 2),
        (ValueError("Expected `levels` to ascend, got [1, 0]."), 2),
        (ValueError("math domain error"), 1),
        (OSError(errno.ENOSPC, "No space left on device", "levels/0.bin"), 6),
        (OSError(errno.EACCES, "Permission denied", "levels/0.bin"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_is_one_line_with_its_status(secateur, made, monkeypatch, tmp_path, error, status):
    def fail(directory):
        raise error

    monkeypatch.setattr("secateur.search.results.run.open_run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    got, out, err = secateur("front", made.study.directory)
    assert (got, out) == (status, "")
    assert is_one_line(err)


def test_the_traceback_of_a_bug_is_kept(secateur, made, monkeypatch, tmp_path):
    def fail(directory):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("secateur.search.results.run.open_run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, _, err = secateur("front", made.study.directory)
    (kept,) = tmp_path.glob("*.traceback")
    assert str(kept) in err
    assert "in fail" in kept.read_text()
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    assert console.run_command(lambda: fail(None)) == 1


def test_memory_that_is_refused_is_no_bug(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for command in (lambda: torch.zeros(1 << 57), lambda: [0] * (1 << 57)):
        assert console.run_command(command) == 1
        err = capsys.readouterr().err
        assert is_one_line(err)
        assert "error: Expected enough memory, got: " in err
        assert "bug" not in err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_seen_behind_another_error(capsys):
    def fail():
        raise RuntimeError("Expected to write the model.") from OSError(
            errno.ENOSPC, "No space left on device"
        )

    assert console.run_command(fail) == 6
    assert is_one_line(capsys.readouterr().err)
