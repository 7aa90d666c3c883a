"""Processes that measure the cells of a board: their figures, their ends, and boards that are killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.search.app.cell_processes import CellProcesses, CellSetup
from secateur.search.board.cells import cells_of
from secateur.search.board.settings import board_settings
from secateur.search.study.study import MEASUREMENTS
from secateur.spaces.measurement import Fidelity
from tests.boards import SMALL, WORDS, lines, measured_here


def test_a_process_measures_itself_alone(tmp_path):
    settings = board_settings(SMALL).model_dump(mode="json")
    processes = CellProcesses(CellSetup(settings, (str(tmp_path),), 1))
    [found] = processes.evaluate(["tiny | wanda 0.5 | equal | seed 0"], Fidelity("test", 256))
    assert found.infeasible is None
    assert 0 < found.values["cpu_seconds"] < found.seconds
    assert 100e6 < found.values["memory_bytes"] < 4e9
    assert found.values["device_seconds"] == 0


def test_a_process_that_dies_is_an_infeasible_cell():
    settings = board_settings(SMALL).model_dump(mode="json")
    processes = CellProcesses(CellSetup({**settings, "executor": {"kind": "nowhere"}}, (), 1))
    [found] = processes.evaluate(["tiny | dense"], Fidelity("test", 256))
    assert re.search(r"its process ended with status 1: .*executor.kind.*nowhere", found.infeasible)


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(true, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_board_continues_where_it_was(monkeypatch, secateur, tmp_path):
    directory, file = tmp_path / "board", tmp_path / "board" / MEASUREMENTS
    words = ["bench", "tiny", *WORDS.split(), "--run", str(directory)]
    command = [sys.executable, "-P", "-c", "from secateur.search.cli import main; main()", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: file.exists() and file.read_bytes().count(b"\n") >= 1)
        wait_until(lambda: children(driver.pid))
        [cell] = children(driver.pid)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    wait_until(lambda: not Path(f"/proc/{cell}").exists())  # nobody waits for it any more
    before, again = file.read_bytes(), measured_here(monkeypatch)
    n_done = before.count(b"\n")
    status, _, err = secateur(*words)
    assert status == 0, err
    wanted = [cell.text for cell in cells_of(board_settings(SMALL))]
    assert again == wanted[n_done:]
    assert file.read_bytes().startswith(before)
    assert [line["candidate"] for line in lines(directory)] == wanted
