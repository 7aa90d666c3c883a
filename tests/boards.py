"""A small board, and its cells measured in the test's process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.search.app import board_cell
from secateur.search.app.cell_processes import CellProcesses
from secateur.search.board.cells import Cell
from secateur.search.board.settings import board_settings
from secateur.search.study.study import MEASUREMENTS

SMALL = {
    "models": ["tiny"],
    "methods": ["magnitude", "wanda", "shortgpt"],
    "sparsities": ["0.25", "0.5"],
    "seeds": [0, 1],
    "tokens": 256,
    "window": 128,
    "calibration_tokens": 256,
    "calibration_window": 64,
}
WORDS = "--methods magnitude,wanda,shortgpt --sparsities 0.25,0.5 --seeds 0,1 --tokens 256 --window 128 "
WORDS += "--calibration-tokens 256 --calibration-window 64"


def measured_here(patch: pytest.MonkeyPatch) -> list[str]:
    """Texts of the cells that are measured from now on, in this process."""
    asked: list[str] = []

    def evaluate(processes, candidates, fidelity):
        asked.extend(candidates)
        settings = board_settings(processes._request["settings"])
        return [board_cell.measure(Cell.parse(text), settings, [Path.cwd()]) for text in candidates]

    patch.setattr(CellProcesses, "evaluate", evaluate)
    return asked


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / MEASUREMENTS).read_text().splitlines()]
