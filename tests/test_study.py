"""The study on disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.search import files
from secateur.search.budget import Spent
from secateur.search.errors import UsageError
from secateur.search.files import StudyWriteError
from secateur.search.loop import notes
from secateur.search.show.console import run_command
from secateur.search.study import journal, overlap
from secateur.search.study.about import About
from secateur.search.study.study import Study
from secateur.spaces.measurement import Measurement
from tests.toy import ABOUT, LARGE, SMALL, child, measurement, start

DEEP = "[" * 100_000


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- the directory ---


def test_what_was_appended_is_there_for_readers_and_for_the_next_driver(tmp_path):
    infeasible = Measurement("x", SMALL, infeasible="too small — ü")
    with start(tmp_path / "new" / "run") as study:
        trials = study.append([measurement(0), infeasible]) + study.append([measurement(0, LARGE)])
        assert [t.number for t in trials] == [0, 1, 2]
        reader = Study.open(study.directory)
        assert reader.trials == study.trials == trials
        assert reader.settings == {"model": "toy"}
        assert reader.about == ABOUT
    with start(tmp_path / "new" / "run") as study:
        assert study.trials == trials
        assert study.warnings == ()
        assert study.lookup(("c0", LARGE.text)) == trials[2]
        assert study.lookup(("c1", LARGE.text)) is None
        assert study.spent == Spent(3, 128, study.trials[0].measurement.seconds * 2)


def test_a_key_is_appended_once(tmp_path):
    with start(tmp_path) as study:
        study.append([measurement(0)])
        for batch in ([measurement(0)], [measurement(1), measurement(1)]):
            with pytest.raises(ValueError, match="new to the study"):
                study.append(batch)
        assert len(Study.open(tmp_path).trials) == 1


def test_of_keys_that_are_twice_in_the_file_the_first_counts(tmp_path):
    with start(tmp_path) as study:
        study.append([measurement(0), measurement(1)])
    path = tmp_path / "measurements.jsonl"
    path.write_text(path.read_text() * 2)
    assert [t.measurement.candidate for t in Study.open(tmp_path).trials] == ["c0", "c1"]


def test_readers_write_nothing(tmp_path):
    start(tmp_path).close()
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="open for writing"):
        Study.open(tmp_path).append([measurement(0)])
    assert contents(tmp_path) == before


def test_another_search_is_refused_with_the_difference_and_nothing_is_touched(tmp_path):
    with start(tmp_path) as study:
        study.append([measurement(0)])
    before = contents(tmp_path)
    other = About({"model": "toy", "space": {"kind": "onemax", "n": 12}, "content": {"sha": "ab"}})
    with pytest.raises(UsageError, match=r"space\.n: 10 -> 12; content\.sha: absent -> ab"):
        start(tmp_path, other)
    assert contents(tmp_path) == before


def test_facts_and_settings_may_change(tmp_path):
    start(tmp_path).close()
    with Study.open_or_create(tmp_path, {"budget": 600}, About(ABOUT.identity, facts={"torch": "3"})):
        pass
    reader = Study.open(tmp_path)
    assert reader.settings == {"budget": 600}
    assert reader.about.facts == {"torch": "3"}


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for make in (start, Study.open):
        with pytest.raises(UsageError):
            make(tmp_path)
        with pytest.raises(UsageError):
            make(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="Make one with a search"):
        Study.open(tmp_path / "nothing")


def test_a_newer_format_and_a_damaged_description_are_named(tmp_path):
    start(tmp_path).close()
    path = tmp_path / "study.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UsageError, match="of format 1, got 99"):
        start(tmp_path)
    for damaged in ("{", DEEP):
        path.write_text(damaged)
        with pytest.raises(UsageError, match="Expected the description of a study"):
            Study.open(tmp_path)


def test_notes_and_overlaps_of_too_many_levels_are_none(tmp_path):
    for name in (notes.NAME, overlap.NAME):
        (tmp_path / name).write_text(DEEP)
    assert notes.read_notes(tmp_path, "random") == {}
    assert overlap.read_overlap(tmp_path) is None


# --- torn and damaged files ---


@pytest.mark.parametrize(
    "torn", ['{"candidate": "c2", "fid', '{"half": \n', "\0\0\0", "é", pytest.param(DEEP + "\n", id="deep")]
)
def test_a_torn_last_line_is_cut_off_by_the_driver_and_left_out_by_readers(tmp_path, torn):
    with start(tmp_path) as study:
        study.append([measurement(0), measurement(1)])
    path = tmp_path / "measurements.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode()[:-1] if torn == "é" else whole + torn.encode())
    assert len(Study.open(tmp_path).trials) == 2
    assert path.read_bytes() != whole
    with start(tmp_path) as study:
        assert path.read_bytes() == whole
        assert "Cut off" in study.warnings[0]
        study.append([measurement(2)])
    assert len(Study.open(tmp_path).trials) == 3


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        '{"candidate": "a"}',
        '{"candidate": "a", "fidelity": "x:1"}',
        "",
        pytest.param(DEEP, id="deep"),
    ],
)
def test_a_bad_line_in_the_middle_is_named(tmp_path, line):
    with start(tmp_path) as study:
        study.append([measurement(0), measurement(1)])
    path = tmp_path / "measurements.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[1], ""]))
    before = contents(tmp_path)
    for make in (start, Study.open):
        with pytest.raises(UsageError, match="in line 2 of"):
            make(tmp_path)
    assert contents(tmp_path) == before


def test_a_file_of_an_older_or_newer_version_stays_readable(tmp_path):
    start(tmp_path).close()
    line = {"candidate": "a", "fidelity": "search:64", "values": {"loss": 1}, "of_the_future": [1]}
    (tmp_path / "measurements.jsonl").write_text(json.dumps(line) + "\n")
    assert Study.open(tmp_path).trials[0].measurement.values == {"loss": 1}


def test_a_full_disk_leaves_whole_lines_and_the_study_continues(tmp_path, monkeypatch):
    real = os.pwrite
    room = [0]

    def pwrite(fd: int, data: bytes, position: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = real(fd, data[: room[0]], position)
        room[0] -= n
        return n

    with start(tmp_path) as study:
        study.append([measurement(0)])
        whole = (tmp_path / "measurements.jsonl").read_bytes()
        monkeypatch.setattr(os, "pwrite", pwrite)
        room[0] = 150  # a part of the batch, across its lines
        with pytest.raises(StudyWriteError, match=r"no space left on device.*1 measurements are safe"):
            study.append([measurement(1), measurement(2)])
        assert (tmp_path / "measurements.jsonl").read_bytes() == whole
        assert len(study.trials) == 1
        room[0] = 10**6
        study.append([measurement(1), measurement(2)])
    monkeypatch.undo()
    with start(tmp_path) as study:
        assert [t.measurement.candidate for t in study.trials] == ["c0", "c1", "c2"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_write_that_fails_for_another_reason_ends_in_one_line_and_keeps_what_was_measured(
    number, tmp_path, monkeypatch, capsys
):
    real = os.pwrite

    def pwrite(fd: int, data: bytes, position: int) -> int:
        real(fd, data[:20], position)
        raise OSError(number, os.strerror(number))

    def truncate(fd: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    def fail() -> None:
        with start(tmp_path) as study:
            study.append([measurement(0)])
            monkeypatch.setattr(os, "pwrite", pwrite)
            monkeypatch.setattr(os, "ftruncate", truncate)
            study.append([measurement(1)])

    assert run_command(fail) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert os.strerror(number) in err
    assert "measurements.jsonl" in err
    monkeypatch.undo()
    with start(tmp_path) as study:
        assert [t.measurement.candidate for t in study.trials] == ["c0"]
        study.append([measurement(1)])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_flushes_are_shared_by_what_comes_within_half_a_second(tmp_path, monkeypatch):
    clock, flushed = [10.0], []
    flush = os.fsync
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(journal.os, "fsync", lambda fd: (flushed.append(clock[0]), flush(fd)))
    study = start(tmp_path)
    flushed.clear()  # those of the directory and of the description
    for index in range(8):
        study.append([measurement(index)])
        assert len(Study.open(tmp_path).trials) == index + 1, "readers see all at once"
        clock[0] += 0.2
    assert flushed == pytest.approx([10.0, 10.6, 11.2])
    study.close()
    study.close()
    assert len(flushed) == 4, "what waits is flushed at the end"


def test_a_flush_at_the_end_that_finds_no_room_is_named(tmp_path, monkeypatch):
    study = start(tmp_path)
    for index in range(2):
        study.append([measurement(index)])

    def full(fd):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(journal.os, "fsync", full)
    with pytest.raises(StudyWriteError, match="all but those of the last"):
        study.close()
    study.close()


def test_a_study_that_finds_no_room_at_the_end_lets_the_next_driver_in(tmp_path, monkeypatch):
    study = start(tmp_path / "run")
    for index in range(2):
        study.append([measurement(index)])

    def full(fd):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", full)
        with pytest.raises(StudyWriteError):
            study.close()
    with start(tmp_path / "run") as again:
        assert len(again.trials) == 2


def test_a_disk_that_is_full_from_the_start_is_said_so(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StudyWriteError, match="Expected room on the disk"):
        start(tmp_path)


# --- one driver ---


def test_a_second_driver_is_refused_with_host_and_process_of_the_first(tmp_path):
    with start(tmp_path), pytest.raises(UsageError, match=rf"process {os.getpid()} on \S+ is writing"):
        start(tmp_path)
    start(tmp_path).close()


def kill_after_lines(process: subprocess.Popen, path: Path, n_lines: int) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < n_lines:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("before", [0, 1])
def test_a_run_that_is_moved_under_its_driver_keeps_what_is_measured(tmp_path, before):
    with start(tmp_path / "old") as study:
        study.append([measurement(number) for number in range(before)])
        (tmp_path / "old").rename(tmp_path / "new")
        study.append([measurement(5)])
        study.append([measurement(6)])
    found = [trial.measurement.candidate for trial in Study.open(tmp_path / "new").trials]
    assert found == [*(f"c{number}" for number in range(before)), "c5", "c6"]
    with start(tmp_path / "new") as study:
        study.append([measurement(7)])
    assert len(Study.open(tmp_path / "new").trials) == before + 3


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    with start(tmp_path) as study:
        for number, now in enumerate((2e9, 1e9, 0.0)):
            monkeypatch.setattr(time, "time", lambda now=now: now)
            study.append([measurement(number)])
    reader = Study.open(tmp_path)
    assert len(reader.trials) == reader.n_unchanged == 3


def test_a_driver_killed_while_appending_loses_nothing_and_leaves_no_lock(tmp_path):
    code = """
        study = start(directory)
        for i in range(10**6):
            study.append([measurement(2 * i), measurement(2 * i + 1)])
            print(2 * i + 2, file=open(directory.parent / "finished", "w"), flush=True)
    """
    process = child(code, tmp_path / "run")
    kill_after_lines(process, tmp_path / "run" / "measurements.jsonl", 40)
    finished = int((tmp_path / "finished").read_text() or 0)
    with start(tmp_path / "run") as study:
        assert len(study.trials) >= max(finished, 38)
        for i, trial in enumerate(study.trials):
            assert trial.measurement == measurement(i)
        study.append([measurement(10**7)])


def test_torch_and_optuna_are_not_loaded_by_what_a_reader_needs():
    code = (
        "import secateur.search.loop.loop, "
        "secateur.search.results.front, secateur.search.results.pick, secateur.search.mirror.mirror, sys;"
        "sys.exit(bool({'torch', 'optuna', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0
