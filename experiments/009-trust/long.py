"""CPU seconds and memory of the commands on long studies, and of continuing one.

    python long.py SCRATCH [tiny smollm2] [--measurements 50000] [--times 3] [--results long.jsonl]

Two studies, made once in SCRATCH by the real controller with simulated losses: `tiny`, continued by a search to its
first new measurement, and one with as many layers as SmolLM2-135M has, which is only read. Each command is a process of
its own, several times; printed are the least CPU seconds, the median time by the clock, and the most memory; of the
search also the memory of one that has measured nothing yet, torch, transformers and the model included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from secateur.search import app
from secateur.search.budget import Budget
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.executor import Executor, Job, WorkerStatus
from secateur.search.loop.loop import Observer, Search
from secateur.search.mirror.optuna_copy import OptunaCopy
from secateur.search.mirror.storages import storage_of
from secateur.search.results.run import Run
from secateur.search.settings.settings import resolved, settings_from
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement

BLOCKS = {"tiny": None, "smollm2": 30}
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "space": {"kind": "allocation", "metric": "magnitude", "target": [0.3, 0.6]},
    "controller": {"kind": "evolution", "start": "uniform"},
    "objectives": ["loss", "params"],
    "evaluator": {"window": 64, "calibration_tokens": 512, "fidelities": [256, 512], "test_tokens": 256},
    "executor": {"kind": "local", "threads": 1},
}
COMMANDS: dict[str, Sequence[str]] = {"front": (), "status": (), "report": (), "pick": ("--sparsity", "0.3")}
SUMS = ("n_params", "macs_per_token", "kv_bytes_per_token")
LIMITS = {"front": 2, "status": 1, "report": 10, "pick": 2, "search": 10}
"""CPU seconds that are aimed at."""


class Simulated(Executor):
    """An executor whose losses add up over slots."""

    def __init__(self, space: Any) -> None:
        self._space, self._job = space, list[Job]()
        self._weights = np.random.default_rng(0).gamma(0.5, size=len(space.slots))

    n_free = property(lambda self: 1 - len(self._job))
    n_pending = property(lambda self: len(self._job))
    job_size = property(lambda self: 16)
    worker_status = property(lambda self: WorkerStatus(1, 1))

    def submit(self, job: Job) -> None:
        self._job.append(job)

    def wait(self) -> list[tuple[Job, list[Measurement]]]:
        job = self._job.pop()
        return [(job, [self._measure(text, job.fidelity) for text in job.candidates])]

    def close(self) -> None:
        pass

    def _measure(self, text: str, fidelity: Fidelity) -> Measurement:
        space, candidate = self._space, self._space.parse(text)
        shares = np.array([space.share(i, option) for i, option in enumerate(space.disassemble(candidate))])
        loss = float(self._weights @ shares**2) * (1 + 1e-3 / fidelity.n_tokens)
        values = {"loss": loss, "kl": loss, "ce": 3 + loss, **space.cost(candidate)}
        return Measurement(text, fidelity, values, n_tokens=fidelity.n_tokens, seconds=0.1, blocks=4)


def make(run: Path, n: int, blocks: int | None) -> None:
    """A study of so many measurements, from a real one's description; `blocks`: with as many as this."""
    app.run(run, **SETTINGS, budget={"evaluations": 4})
    with Study.open_or_create(run, *described(run, n, blocks)) as study:
        space, settings = Run(study).space, Run(study).settings
        fidelities = settings.evaluator.search_fidelities
        study.name_baselines({name: candidate.text for name, candidate in space.baselines().items()})
        row = CONTROLLERS[settings.controller.kind]
        controller = row.build(space, fidelities, settings.seed, settings.controller)
        executor, budget = Simulated(space), Budget(evaluations=n)
        Search(study, space.baselines(), controller, executor, budget, fidelities[-1]).run()
        storage = storage_of(run, settings.storage)
        OptunaCopy(study, space, settings.objectives, fidelities[-1], storage).catch_up()


def described(run: Path, n: int, blocks: int | None) -> tuple[dict[str, Any], Any]:
    """Settings and description for the study, whose measurements are removed."""
    study = Study.open(run)
    for name in ("measurements.jsonl", "measurements.sha256", "optuna.log"):
        (run / name).unlink()
    settings = resolved(settings_from({**SETTINGS, "budget": {"evaluations": n}}))
    facts = dict(study.about.facts)
    if blocks:
        linears = [x for x in facts["shape"]["linears"] if x["block"] == 0]
        more = [
            {**x, "block": i, "name": x["name"].replace("layers.0", f"layers.{i}")}
            for i in range(blocks)
            for x in linears
        ]
        shape = {name: x * blocks if name in SUMS else x for name, x in facts["shape"].items()}
        facts["shape"] = {**shape, "linears": more}
    return settings, replace(study.about, facts=facts)


class UntilNew(Observer):
    """Stops a search at its first new measurement, and prints what it took."""

    def __init__(self) -> None:
        self.loop: Search | None = None
        self.n_known = 0

    def on_start(self, n_known: int, budget: Budget) -> None:
        self.n_known = n_known

    def on_trials(self, trials: Any, spent: Any) -> None:
        if any(trial.number >= self.n_known for trial in trials):
            print(json.dumps({"cpu_s": time.process_time(), "mb": peak_mb()}))
            assert self.loop is not None
            self.loop.stop()


def peak_mb() -> float:
    """Most resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def go_on(run: Path, n: int) -> None:
    """Continue a search to its first new measurement."""
    observer = UntilNew()

    def ready(loop: Search, executor: Executor) -> None:
        observer.loop = loop

    settings = settings_from({**SETTINGS, "budget": {"evaluations": n}})
    app.search(settings, run, observers=[observer], on_ready=ready)


LAUNCH = """
import json, os, subprocess, sys
with subprocess.Popen(sys.argv[1:], stderr=subprocess.DEVNULL) as child:
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
if child.returncode == 0 and "--go-on" not in sys.argv:
    print(json.dumps({"cpu_s": usage.ru_utime + usage.ru_stime, "mb": usage.ru_maxrss * 1024 / 1e6}))
sys.exit(child.returncode)
"""
"""A small process between: a process counts the memory of the one that it is forked from as its own."""


def measured(command: Sequence[str]) -> tuple[float, float, float]:
    """CPU seconds, seconds by the clock and most memory in MB of a process."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCH, *command], stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found["cpu_s"], time.monotonic() - began, found["mb"]


def row_of(
    study: str, name: str, command: Sequence[str], n: int, times: int, scratch: Path | None = None
) -> dict[str, Any]:
    """Row of the table, from several processes; with a directory each continues a copy of the study in it."""
    rows = []
    for _ in range(times):
        place = []
        if scratch is not None:
            place = [str(scratch / "copy")]
            shutil.rmtree(place[0], ignore_errors=True)
            if n:
                shutil.copytree(scratch / study, place[0])
        rows.append(measured([*command, *place]))
    cpu, clock, mb = zip(*rows, strict=True)
    row = {"study": study, "command": name, "measurements": n, "cpu_s": round(min(cpu), 2)}
    row |= {"aim_s": LIMITS[name], "clock_s": round(statistics.median(clock), 2), "mb": round(max(mb))}
    cells = [study, name, f"{n:,}", *(str(row[key]) for key in ("cpu_s", "aim_s", "clock_s", "mb"))]
    print(f"| {' | '.join(cells)} |", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(BLOCKS)}; default: both")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--measurements", type=int, default=50_000)
    parser.add_argument("--results", type=Path)
    parser.add_argument(
        "--go-on", action="store_true", help="continue the run SCRATCH to its first new measurement"
    )
    parser.add_argument("--make", action="store_true", help="make one study, and nothing else")
    args = parser.parse_args()
    n = args.measurements
    if args.make:
        make(args.scratch / args.studies[0], n, BLOCKS[args.studies[0]])
        return
    if args.go_on:
        go_on(args.scratch, n)
        return
    rows = []
    print("| study | command | measurements | CPU, s | aim, s | by the clock, s | memory, MB |", flush=True)
    print("|---|---|" + "---:|" * 5)
    for study in args.studies or BLOCKS:
        run = args.scratch / study
        if not run.exists():
            again = [sys.executable, __file__, str(args.scratch), study, "--measurements", str(n), "--make"]
            subprocess.run(again, check=True)  # its memory would count as that of later children
        for name, words in COMMANDS.items():
            command = [sys.executable, "-m", "secateur.search.cli", name, str(run), *words]
            rows.append(row_of(study, name, command, n, args.times))
    command = [sys.executable, __file__, "--go-on", "--measurements", str(n + 64)]
    if "tiny" in (args.studies or BLOCKS):
        rows += [row_of("tiny", "search", command, known, args.times, args.scratch) for known in (0, n)]
    if args.results:
        with args.results.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
