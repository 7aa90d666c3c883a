"""Evaluations a second with one and with two workers, time lost outside evaluation, memory of the second worker.

    python run.py SCRATCH [--model tiny] [--text docs] [--levels DIR] [--evaluations 40] [--rounds 3] [--tokens 512]

Random candidates at one fidelity, so that every evaluation is the same work. Rounds with one and with two workers are
interleaved. A rate is taken from the first measurement of random candidates to the last one; what is lost is the part
of that time, over all workers, that is not in the measurements' own seconds. Memory is the proportional set size (PSS)
of the workers' processes after the last evaluation, of their mappings of the model's weights, and of what is theirs
alone, and the most of the latter that was seen while they measured; and what a Python with torch and transformers has
of its own without any model.
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
from pathlib import Path

from secateur.search import app
from secateur.search.settings import settings_from

PERIOD_S = 0.2


class Clock:
    """When trials came, and the memory of those who measured them."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, list]] = []
        self.pids: set[int] = set()
        self.memory: list[dict[str, float]] = []
        self._peak: dict[int, float] = {}
        self._ended = threading.Event()

    def on_start(self, n_known, budget) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def on_trials(self, trials, spent) -> None:
        self.seen.append((time.perf_counter(), list(trials)))
        self.pids |= {int(t.measurement.worker.rpartition(":")[2]) for t in trials}

    def on_end(self, outcome) -> None:
        self._ended.set()
        self.memory = [pss(pid) | {"peak": self._peak[pid]} for pid in sorted(self.pids)]

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD_S):
            for pid in sorted(self.pids):
                self._peak[pid] = max(self._peak.get(pid, 0.0), anonymous(pid))


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


def one(args: argparse.Namespace, n_workers: int, directory: Path) -> dict:
    shutil.rmtree(directory, ignore_errors=True)
    data = dict.fromkeys(("calibration", "search", "test"), args.text)
    settings = settings_from(
        {
            "model": args.model,
            "space": {"kind": "allocation", "metric": args.metric, "target": 0.6, "max_sparsity": 0.9},
            "controller": {"kind": "random"},
            "evaluator": {"data": data, "fidelities": [args.tokens], "test_tokens": 512},
            "executor": {"kind": "ray", "workers": n_workers, "batch": 2 * n_workers},
            "budget": {"evaluations": args.evaluations},
        }
    )
    clock = Clock()
    app.search(settings, directory, observers=[clock], levels=args.levels)
    # From the third arrival on: the first calls include what a worker prepares once, the baselines have other costs.
    skip = 2 * n_workers
    begin, end = clock.seen[skip - 1][0], clock.seen[-1][0]
    trials = [trial for _, some in clock.seen[skip:] for trial in some]
    seconds = sum(trial.measurement.seconds for trial in trials)
    return {
        "workers": n_workers,
        "evaluations": len(trials),
        "per_second": len(trials) / (end - begin),
        "lost": 1 - seconds / (n_workers * (end - begin)),
        "memory_mb": clock.memory,
    }


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
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.levels = args.levels or args.scratch / "levels"
    rounds = []
    for index in range(args.rounds):
        pair = {n: one(args, n, args.scratch / f"run-{n}") for n in (1, 2)}
        rounds.append(pair)
        speedup = pair[2]["per_second"] / pair[1]["per_second"]
        print(f"round {index}: {json.dumps(list(pair.values()))} speed-up {speedup:.2f}", flush=True)
    speedups = [pair[2]["per_second"] / pair[1]["per_second"] for pair in rounds]
    losses = [pair[n]["lost"] for pair in rounds for n in (1, 2)]
    row = {
        "model": args.model,
        "tokens": args.tokens,
        "speed_up": [round(statistics.median(speedups), 3), round(min(speedups), 3), round(max(speedups), 3)],
        "lost": [round(statistics.median(losses), 4), round(min(losses), 4), round(max(losses), 4)],
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
