"""Kill the driver of `secateur recover` in the middle, continue, and compare with a run that nobody disturbed.

    python experiments/002-faults/recover.py [DIRECTORY]

Searches `tiny` briefly, then recovers one trial twice: unbroken in a copy of the run, and with a SIGKILL after some
slices. Both must end with the same weights, bit by bit, and with one measurement.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from secateur.search.results.run import open_run

SECATEUR = [sys.executable, "-m", "secateur.search.cli"]
SETTINGS = [
    "space.target=0.6",
    "controller.kind=uniform",
    "evaluator.fidelities=[1024]",
    "evaluator.test_tokens=1024",
    "budget.evaluations=2",
]
RECOVER = ["--method", "full", "--tokens", "40960"]


def recover(run: Path, kill_after: int | None = None) -> list[int]:
    """Run the command; kill it once so many reports were seen. Returns the trained tokens that it reported."""
    started = time.monotonic()
    command = [*SECATEUR, "recover", str(run), "--sparsity", "0.6", *RECOVER]
    reported: list[int] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            found = re.search(r"([\d,]+)/40,960 tokens", line)
            if found:
                reported.append(int(found[1].replace(",", "")))
                print(f"{time.monotonic() - started:6.1f} s  {line.strip()}", flush=True)
            if kill_after is not None and len(reported) == kill_after:
                child.kill()
                print(f"{time.monotonic() - started:6.1f} s  killed", flush=True)
                break
    print(f"{time.monotonic() - started:6.1f} s  ended with status {child.returncode}", flush=True)
    return reported


def result(run: Path) -> tuple[str, list[float]]:
    """Hash of the recovered weights, and the losses in the study."""
    (model,) = run.glob("recovered/*/model/model.safetensors")
    trials = open_run(run).study.trials
    losses = [t.measurement.values["loss"] for t in trials if t.measurement.fidelity.part == "recovered"]
    return hashlib.sha256(model.read_bytes()).hexdigest(), losses


def main(directory: Path) -> None:
    """Both runs, and whether they agree."""
    unbroken, killed = directory / "unbroken", directory / "killed"
    overrides = [word for setting in SETTINGS for word in ("-o", setting)]
    subprocess.run([*SECATEUR, "search", *overrides, "--run", str(unbroken)], check=True)
    shutil.copytree(unbroken, killed)
    print("unbroken")
    recover(unbroken)
    print("killed")
    before = recover(killed, kill_after=4)
    print("continued")
    after = recover(killed)
    print(f"trained again: {len(set(before) & set(after))} of {len(before)} slices")
    same = result(unbroken) == result(killed)
    print(f"same weights and one measurement: {same}")
    sys.exit(0 if same and len(result(killed)[1]) == 1 and min(after) > min(before) else 1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
