"""Checks of a GPU: equality with the CPU on tiny, then times and memory of an 8B-shaped model with random weights.

    python device.py [--small] [--device cuda] [--minutes 6] [--out device.json]

Prints a table and writes JSON. A part that would begin after the time is over is skipped, and its row says so.
`--small` runs every part on small shapes, on a CPU too, so that the script itself is tested.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from device_equality import Equality
from device_large import Large
from device_rows import Checked, Row, line_of


def checked_rows(checked: Checked, deadline: float) -> list[Row]:
    """Rows of all parts; one that fails does not end the others.

    Args:
        deadline: of `time.monotonic`, after which no part begins.
    """
    rows = list[Row]()
    for name, part in {**Equality(checked).parts, **Large(checked, rows).parts}.items():
        row = Row(name)
        rows.append(row)
        if time.monotonic() > deadline:
            row.error = "skipped: the time is over"
            continue
        began = time.perf_counter()
        try:
            part(row)
            checked.wait()
        except Exception as error:  # noqa: BLE001  a check that failed is a result
            row.error, row.met = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
        row.seconds = round(time.perf_counter() - began, 2)
        print(line_of(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small shapes, on a CPU too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="no part begins after them")
    parser.add_argument("--out", type=Path, default=Path("device.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu" and not args.small:
        parser.error("Expected a GPU, got none. Add --small to try the script on a CPU.")
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as directory:
        rows = checked_rows(Checked(device, Path(directory), args.small), deadline)
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "small": args.small,
        "rows": [asdict(row) for row in rows],
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = [row.part for row in rows if row.met is False]
    print(f"wrote {args.out}; " + (f"not met: {', '.join(failed)}" if failed else "no aim missed"))
    raise SystemExit(1 if any(row.error for row in rows if row.met is False) else 0)


if __name__ == "__main__":
    main()
