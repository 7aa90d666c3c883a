"""Evaluations a second with one and with two workers, time lost outside evaluation, memory of the second worker.

    python run.py SCRATCH [--model tiny] [--text docs] [--levels DIR] [--evaluations 40] [--rounds 3] [--tokens 512]

Random candidates at one fidelity, so that every evaluation is the same work. Rounds with one and with two workers are
interleaved. A rate is taken from when each worker has delivered twice to the last measurement; what is lost is the part
of that time, over all workers, that is not in the measurements' own seconds; `driver_ms` is the driver's CPU time for
each of them. The machine's own speed-up is that of two processes without Ray, a driver, or anything to do with each
other, in the same rounds.

Memory is the proportional set size (PSS) of the workers' processes after the last evaluation, of their mappings of the
model's weights, and of what is theirs alone, and the most of the latter that was seen while they measured; and what a
Python with torch and transformers has of its own without any model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np

from secateur.evaluators.session import set_threads
from secateur.search import app
from secateur.search.settings.settings import Settings, settings_from
from secateur.spaces.measurement import Fidelity

PERIOD_S = 0.2


class Clock:
    """When trials came, and the memory of those who measured them."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, list]] = []
        self.cpu: list[float] = []  # the driver's, at these times
        self.pids: set[int] = set()
        self.memory: list[dict[str, float]] = []
        self.peak: dict[int, float] = {}
        self._ended = threading.Event()

    def on_start(self, n_known, budget) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def on_trials(self, trials, spent) -> None:
        self.seen.append((time.perf_counter(), list(trials)))
        self.cpu.append(time.process_time())
        self.pids |= {int(t.measurement.worker.rpartition(":")[2]) for t in trials}

    def on_end(self, outcome) -> None:
        self.memory = [pss(pid) for pid in sorted(self.pids)]

    def all_at(self, n_workers: int) -> int:
        """Arrivals until each worker had delivered twice."""
        counts: Counter[str] = Counter()
        for index, (_, trials) in enumerate(self.seen):
            counts.update({trial.measurement.worker for trial in trials})
            if sum(count >= 2 for count in counts.values()) == n_workers:
                return index + 1
        raise SystemExit(f"Expected {n_workers} workers to deliver, got {dict(counts)}.")

    def stop(self) -> None:
        """After the test measurement, which workers make, too."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD_S):
            for pid in sorted(self.pids):
                with suppress(OSError, StopIteration):  # it has ended, or is about to
                    self.peak[pid] = max(self.peak.get(pid, 0.0), anonymous(pid))


def anonymous(pid: int) -> float:
    """MB that are no file's: a counter of the kernel, so that reading it costs the process nothing."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) / 1024


def interpreter() -> float:
    """MB of its own that a Python has with torch and transformers and no model."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import torch, transformers.models.llama.modeling_llama\nprint()\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    found = anonymous(child.pid)
    child.communicate(b"\n")
    return found


def pss(pid: int) -> dict[str, float]:
    """In MB: all of it, the mapped files of weights, and what is no file's: its own."""
    total = weights = 0
    path = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Pss":
            total += int(rest.split()[0])
            weights += int(rest.split()[0]) if path.endswith("model.safetensors") else 0
        elif "-" in name:  # the head of a mapping ends in its path
            path = line
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    own = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss_Anon:"))
    return {"all": total / 1024, "weights": weights / 1024, "own": own / 1024}


def settings_of(args: argparse.Namespace, n_workers: int) -> Settings:
    data = dict.fromkeys(("calibration", "search", "test"), args.text)
    return settings_from(
        {
            "model": args.model,
            "space": {"kind": "allocation", "metric": args.metric, "target": 0.6, "max_sparsity": 0.9},
            "controller": {"kind": "random"},
            "evaluator": {"data": data, "fidelities": [args.tokens], "test_tokens": 512},
            "executor": {"kind": "ray", "workers": n_workers, "batch": 2 * n_workers},
            "budget": {"evaluations": args.evaluations},
        }
    )


def alone(args: argparse.Namespace, seed: int, ready: Barrier, rates: Queue) -> None:
    """Evaluations a second of a process by itself, while others do the same."""
    set_threads(1)
    session = app.open_session(settings_of(args, 1))
    session.build_levels(args.levels)
    evaluator, rng = session.evaluator(args.levels), np.random.default_rng(seed)
    texts = [session.space.sample(rng, 0).text for _ in range(args.evaluations)]
    fidelity = Fidelity("search", args.tokens)
    evaluator.evaluate(texts[:1], fidelity)
    ready.wait()
    started = time.perf_counter()
    for text in texts[1:]:
        evaluator.evaluate([text], fidelity)
    rates.put((len(texts) - 1) / (time.perf_counter() - started))


def machine(args: argparse.Namespace, n: int) -> float:
    """Evaluations a second of so many processes that have nothing to do with each other."""
    spawn = get_context("spawn")
    ready, rates = spawn.Barrier(n), spawn.Queue()
    processes = [spawn.Process(target=alone, args=(args, seed, ready, rates)) for seed in range(n)]
    for process in processes:
        process.start()
    found = sum(rates.get() for _ in processes)
    for process in processes:
        process.join()
    return found


def one(args: argparse.Namespace, n_workers: int, directory: Path) -> dict:
    shutil.rmtree(directory, ignore_errors=True)
    clock = Clock()
    app.search(settings_of(args, n_workers), directory, observers=[clock], levels=args.levels)
    clock.stop()
    # The first calls include what a worker prepares once, the baselines have other costs; workers begin one by one.
    skip = max(2 * n_workers, clock.all_at(n_workers))
    begin, end = clock.seen[skip - 1][0], clock.seen[-1][0]
    trials = [trial for _, some in clock.seen[skip:] for trial in some]
    seconds = sum(trial.measurement.seconds for trial in trials)
    return {
        "workers": n_workers,
        "evaluations": len(trials),
        "per_second": len(trials) / (end - begin),
        "lost": 1 - seconds / (n_workers * (end - begin)),
        "driver_ms": (clock.cpu[-1] - clock.cpu[skip - 1]) / len(trials) * 1e3,
        "memory_mb": [
            found | {"peak": clock.peak[pid]}
            for pid, found in zip(sorted(clock.pids), clock.memory, strict=True)
        ],
    }


def spread(values: list[float]) -> list[float]:
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--metric", default="wanda")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--levels", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-machine", action="store_true", help="leave out processes without Ray")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.levels = args.levels or args.scratch / "levels"
    rounds, ceilings = [], []
    for index in range(args.rounds):
        pair = {n: one(args, n, args.scratch / f"run-{n}") for n in (1, 2)}
        rounds.append(pair)
        speedup = pair[2]["per_second"] / pair[1]["per_second"]
        print(f"round {index}: {json.dumps(list(pair.values()))} speed-up {speedup:.2f}", flush=True)
        if not args.no_machine:
            bare = {n: machine(args, n) for n in (1, 2)}
            ceilings.append(bare[2] / bare[1])
            print(f"round {index}: {bare} a second without Ray, {ceilings[-1]:.2f}", flush=True)
    speedups = [pair[2]["per_second"] / pair[1]["per_second"] for pair in rounds]
    losses = [pair[n]["lost"] for pair in rounds for n in (1, 2)]
    row = {
        "model": args.model,
        "tokens": args.tokens,
        "speed_up": spread(speedups),
        "speed_up_of_machine": spread(ceilings) if ceilings else None,
        "lost": spread(losses),
        "driver_ms": [round(pair[n]["driver_ms"], 2) for pair in rounds for n in (1, 2)],
        "per_second": [round(pair[n]["per_second"], 3) for pair in rounds for n in (1, 2)],
        "memory_mb": rounds[-1][2]["memory_mb"],
        "interpreter_mb": interpreter(),
    }
    print(json.dumps(row))
    if args.results:
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
