"""Processes that measure the cells of a board, one after another: the evaluator of a board's workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from secateur.search.board.cells import Cell
from secateur.spaces.measurement import Fidelity, Measurement

SHOWN = 300  # characters of a process's last words


@dataclass(frozen=True)
class CellSetup:
    """Setup of a board's workers, plain values alone.

    Args:
        settings: of the board, as plain values.
        folders: that relative paths are looked for in.
        threads: of torch in a cell's process; None: its own choice.
    """

    settings: Mapping[str, Any]
    folders: tuple[str, ...]
    threads: int | None
    directories: tuple[Path, ...] = ()

    def __call__(self, directories: Sequence[Path]) -> CellProcesses:
        """The evaluator; cells read models and texts by their names."""
        return CellProcesses(self)


class CellProcesses:
    """Evaluator of cells, each in a process of its own that ends with this one."""

    def __init__(self, setup: CellSetup) -> None:
        self._request = {
            "settings": dict(setup.settings),
            "folders": list(setup.folders),
            "threads": setup.threads,
        }

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """One measurement a cell, in order; a process that dies is an infeasible one."""
        return [self._measured(text, fidelity) for text in candidates]

    def _measured(self, text: str, fidelity: Fidelity) -> Measurement:
        started = time.perf_counter()
        with TemporaryFile() as errors:
            answer, status = self._answer(text, errors)
            if status == 0 and answer:
                found = Measurement.from_json(json.loads(answer))
            else:
                reason = _ending(status, errors)
                found = Measurement(text, fidelity, infeasible=reason, seed=Cell.parse(text).seed)
        return replace(found, seconds=time.perf_counter() - started)

    def _answer(self, text: str, errors: BinaryIO) -> tuple[bytes, int]:
        """Answer of a new process, and its exit status."""
        command = [sys.executable, "-P", "-c", "from secateur.search.app.board_cell import main; main()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, whose end ends the other
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps({**self._request, "cell": text}).encode() + b"\n")
                process.stdin.flush()
                answer = process.stdout.read()  # stdin stays open meanwhile
            except BrokenPipeError:
                answer = b""
            except BaseException:
                process.kill()
                raise
        return answer, process.returncode


def _ending(status: int, errors: BinaryIO) -> str:
    """Reason for no answer: the signal or the last line of the process's errors."""
    if status < 0:
        name = signal.Signals(-status).name
        memory = ", as for want of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
    return f"its process ended with status {status}: {last[:SHOWN]}"
