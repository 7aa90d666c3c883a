"""A thousandth of the hostile inputs of experiments/009-trust: accepted, or refused in one line, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[1] / "experiments" / "009-trust" / "run.py"


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits of processes, and their memory from /proc"
)
def test_hostile_inputs_are_accepted_or_refused_in_one_line():
    command = [sys.executable, str(RUN), "--share", "0.001", "--seed", "7", "--jobs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    total = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    names = (
        "kind",
        "inputs",
        "accepted",
        "refused",
        "traceback",
        "killed",
        "nonsense",
        "over_2_s",
        "over_300_mb",
    )
    row = dict(zip(names, total, strict=False))
    assert row["kind"] == "all"
    assert int(row["inputs"]) == int(row["accepted"]) + int(row["refused"]) == 12
    assert {row[name] for name in names[4:]} == {"0"}
