"""Kill parts of the Ray that a search has started for itself, and continue with the command that the last line names.

    python own_ray.py [agent raylet gcs] [--evaluations 60] [--results results.jsonl]

``secateur search`` on `tiny` with ``executor: {kind: ray}`` on this machine, without an address, is hit with
``kill -9`` when a third of its budget is measured; the command in the last line of stderr is then run as it stands
there. Rounds are deterministic, so that the trials must be those of a search that nobody disturbed. Needs the extra
`ray`, and Linux.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from nodes import LIMIT_S, PERIOD_S, descendants, kill, program

SETTINGS = """
model: tiny
space: {kind: allocation, metric: magnitude, target: 0.6}
controller: {kind: evolution, offspring: 8}
evaluator: {window: 64, calibration_tokens: 512, fidelities: [256, 512], test_tokens: 512}
executor: {kind: ray, workers: 2, deterministic: true}
"""
PARTS = {"agent": "ray::DashboardAgent", "raylet": "raylet", "gcs": "gcs_server"}
"""Processes of Ray that are killed: a name for the table, and a word of the process's command line."""

VARYING = ("seconds", "started", "ended", "worker", "blocks", "blocks_saved")


def trials(run: Path) -> list[dict[str, Any]]:
    """Measurements without what differs from run to run; those of the test part may come in any order."""
    file = run / "measurements.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = [{key: value for key, value in row.items() if key not in VARYING} for row in rows]
    is_test = [row["fidelity"].startswith("test") for row in rows]
    searched = [row for row, test in zip(rows, is_test, strict=True) if not test]
    return searched + sorted((r for r, test in zip(rows, is_test, strict=True) if test), key=str)


def n_lines(run: Path) -> int:
    file = run / "measurements.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def search(arguments: list[str], run: Path, part: str | None = None, at: int = 0) -> dict[str, Any]:
    """One command to its end, hit once if a part is named; its status, what it said last, and how long that took."""
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "secateur.search.cli", *arguments]
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        end, hit, n_hit = time.monotonic() + LIMIT_S, 0.0, 0
        while driver.poll() is None and time.monotonic() < end:
            if part and not hit and n_lines(run) >= at:
                pids = [pid for pid in descendants(driver.pid) if program(pid).startswith(PARTS[part])]
                kill(pids)
                hit, n_hit = time.monotonic(), len(pids)
            time.sleep(PERIOD_S)
        ended = time.monotonic()
        if driver.poll() is None:
            driver.kill()
        time.sleep(3)  # the process that outlives the driver asks the ports first
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    row: dict[str, Any] = {"exit_status": driver.wait(), "last_line": lines[-1] if lines else ""}
    return row | ({"killed": n_hit, "ended_s": round(ended - hit, 1)} if part else {})


def measure(part: str, n: int, scratch: Path, unbroken: list[dict[str, Any]]) -> dict[str, Any]:
    """One search that loses a part of its Ray, and the command that its last line names."""
    run = scratch / part
    row: dict[str, Any] = {"fault": f"own ray: {part}"}
    row |= search(["search", str(scratch / "settings.yaml"), "--run", str(run)], run, part, n // 3)
    row["measured"] = len(before := trials(run))
    _, found, named = row["last_line"].partition("Continue with: secateur ")
    if row["exit_status"] and found:
        again = search(shlex.split(named), run)
        row["again_exit_status"] = again["exit_status"]
        row["lost"] = sum(trial not in trials(run) for trial in before)
    pairs = list(itertools.zip_longest(trials(run), unbroken))
    row |= {"trials": len(pairs), "differ": sum(one != other for one, other in pairs)}
    if row["differ"]:
        print(next(pair for pair in pairs if pair[0] != pair[1]), file=sys.stderr)
    row["last_line"] = row["last_line"].replace(str(scratch), "SCRATCH").replace(str(Path.home()), "~")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.jsonl")
    args = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    about = {"cores": os.cpu_count(), "python": platform.python_version(), "ray": metadata.version("ray")}
    scratch = Path(tempfile.mkdtemp(prefix="o", dir="/tmp"))  # Ray's sockets need short paths
    os.environ["RAY_TMPDIR"] = str(scratch)
    try:
        budget = f"budget: {{evaluations: {args.evaluations}}}\n"
        (scratch / "settings.yaml").write_text(SETTINGS + budget)
        whole = search(
            ["search", str(scratch / "settings.yaml"), "--run", str(scratch / "none")], scratch / "none"
        )
        if whole["exit_status"]:
            raise RuntimeError(whole["last_line"])
        for part in args.parts or PARTS:
            row = {
                "experiment": "own ray",
                **measure(part, args.evaluations, scratch, trials(scratch / "none")),
            }
            print(json.dumps(row | about, indent=1), flush=True)
            with args.results.open("a") as file:
                file.write(json.dumps(row | about) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
