"""Checks of a GPU: equality with the CPU on tiny, then times and memory of an 8B-shaped model with random weights.

    scripts/device-check [--small] [--device cuda] [--minutes 6] [--parts levels,candidates] [--out device.json]
    scripts/device-check --pack     # where there is a network, see there

Prints a line for each part as soon as it is done, and writes all rows so far to the JSON file, so that a part that
fails, or a machine that is taken away, loses no other part's result. A part that would begin after the time is over is
skipped, and its row says so; `--parts` runs it alone the next time. `--small` runs every part on small shapes, on a CPU
too, so that the script itself is tested.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from device_rows import Checked, Part, Row, line_of

NEEDED = {"candidates": ("17 levels",), "candidates, compiled": ("17 levels", "candidates")}
"""Parts that others need, which leave something for them."""


def chosen(parts: Mapping[str, Part], wanted: str | None) -> dict[str, Part]:
    """The parts whose names have one of these words, with those that they need; None: all.

    Raises:
        ValueError: if there is none for a word.
    """
    words = [] if wanted is None else [word.strip() for word in wanted.split(",")]
    if unknown := [word for word in words if not any(word in name for name in parts)]:
        raise ValueError(f"Expected `--parts` out of: {'; '.join(parts)}, got {unknown[0]!r}.")
    names = {name for name in parts if not words or any(word in name for word in words)}
    names |= {before for name in names for before in NEEDED.get(name, ())}
    return {name: part for name, part in parts.items() if name in names}


def run_parts(
    parts: Mapping[str, Part], checked: Checked, rows: list[Row], deadline: float, note: Callable[[], None]
) -> None:
    """Run the parts one after the other; one that fails does not end the others.

    Args:
        parts: by name.
        checked: the device.
        rows: of all parts so far, which are added to.
        deadline: of `time.monotonic`, after which no part begins.
        note: called after each row.
    """
    for name, part in parts.items():
        row = Row(name)
        rows.append(row)
        if time.monotonic() > deadline:
            row.error = "skipped: the time is over"
        else:
            _run(part, checked, row)
        print(line_of(row), flush=True)
        note()


def _run(part: Part, checked: Checked, row: Row) -> None:
    """Fill the row of a part; what is left of one that failed is freed."""
    began = time.perf_counter()
    try:
        part(row)
        checked.wait()
    except Exception as error:  # noqa: BLE001  a check that failed is a result
        row.error, row.met = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
    row.seconds = round(time.perf_counter() - began, 2)
    if row.error:
        gc.collect()
        if checked.device.type == "cuda":
            torch.cuda.empty_cache()


def facts(device: torch.device, small: bool) -> dict[str, Any]:
    """Date, commit and hardware."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "small": small,
    }


def write(path: Path, found: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write facts and rows; a kill in the midst of it leaves those before."""
    beside = path.with_name(f"{path.name}.part")
    text = json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/device-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="small shapes, on a CPU too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="no part begins after them")
    parser.add_argument(
        "--parts", help="words in the names of the parts to run, separated by commas; default: all"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("device.json"), help="JSON file, replaced after each part"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu" and not args.small:
        parser.error("Expected a GPU, got none. Add --small to try the script on a CPU.")
    deadline = time.monotonic() + 60 * args.minutes
    from device_equality import Equality  # after --help, which needs torch alone
    from device_large import Large

    rows, found = list[Row](), facts(device, args.small)
    with tempfile.TemporaryDirectory() as directory:
        checked = Checked(device, Path(directory), args.small)
        try:
            parts = chosen({**Equality(checked).parts, **Large(checked, rows).parts}, args.parts)
            write(args.out, found, rows)  # a place that can't be written is seen before minutes of work
        except (ValueError, OSError) as error:
            parser.error(str(error))
        run_parts(parts, checked, rows, deadline, lambda: write(args.out, found, rows))
    failed = [row.part for row in rows if row.met is False]
    print(f"wrote {args.out}; " + (f"not met: {', '.join(failed)}" if failed else "no aim missed"))
    raise SystemExit(1 if any(row.error for row in rows if row.met is False) else 0)


if __name__ == "__main__":
    main()
