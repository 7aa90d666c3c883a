"""Forecast of a command beside the truth, in a small file of the run or model that it made, for display."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.search.files import checked
from secateur.spaces.whole_file import whole_file

FORECAST = "forecast.json"


def write_foreseen(directory: Path, forecast: Mapping[str, Any], truth: Mapping[str, float]) -> None:
    """Write a forecast beside the truth; a full disk is ignored, since the study reports it.

    Args:
        directory: of the run, of the pruned model, or of the recovered one with its record.
        forecast: plain values, see `Forecast.to_json`.
        truth: ``driver``, the peak of its resident memory, and ``disk``, that of the files that the command made, in
            bytes; ``seconds`` of all drivers of a run, of a pruning, or of the training of a recovery.
    """
    text = json.dumps({"forecast": dict(forecast), "truth": dict(truth)}, indent=1) + "\n"
    with contextlib.suppress(OSError), whole_file(directory / FORECAST) as new:
        new.write_text(text, encoding="utf-8")


def read_foreseen(directory: Path) -> tuple[dict[str, Any], dict[str, float]] | None:
    """The forecast and the truth in a directory; None if it has none, as runs of old, or a damaged one."""
    try:
        record = json.loads((directory / FORECAST).read_text(encoding="utf-8"))
        forecast = dict(record["forecast"])
        known = {name: forecast[name] for name in ("driver", "seconds")} | {"disk": forecast["peak"]["disk"]}
        forecast.setdefault("left", known["disk"])  # records of old have the peak alone
        checked(json.dumps({**known, "left": forecast["left"]}), dict[str, float | None], FORECAST)
        truth = checked(json.dumps(record["truth"]), dict[str, float], FORECAST)
        return (forecast, truth) if {"driver", "disk", "seconds"} <= truth.keys() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def disk_bytes(directory: Path) -> int:
    """Bytes of all files of a run."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            total += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
    return total
