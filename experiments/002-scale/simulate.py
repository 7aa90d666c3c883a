"""Many workers without the machines: real controller, real loop, real study, simulated workers.

    python simulate.py RUN [--workers 256 1024] [--evaluations 40000] [--seeds 0]

RUN is a finished search (for its space and for the evaluation times that it saw); nothing is written to it. The clock
is simulated: a call takes the seconds of calls that were seen, drawn at random for its fidelity, and while the driver
works it advances by the driver's own CPU time and by 5 ms for each flush to the disk. Workers have two calls in flight.
The mirror, which in a search has a thread of its own, writes its journal in the same turn, once a second.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from secateur.search.budget import Budget
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.executor import Executor, Job, WorkerStatus
from secateur.search.loop.loop import Search
from secateur.search.mirror.mirror import GATHER_S
from secateur.search.mirror.optuna_copy import OptunaCopy
from secateur.search.mirror.storages import storage_of
from secateur.search.results.run import open_run
from secateur.search.study.about import About
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement

FLUSH_S = 0.005
IN_FLIGHT = 2


class Landscape:
    """A loss that adds up over slots, with a little noise; and how long it takes to measure."""

    def __init__(self, run, rng: np.random.Generator) -> None:
        self.space = run.space
        self.weights = rng.gamma(0.5, size=len(self.space.slots))
        self.rng = rng
        self.seconds = defaultdict(list)
        for trial in run.study.trials:
            m = trial.measurement
            if m.fidelity.part == "search" and m.seconds > 0.05:
                self.seconds[m.fidelity.text].append(m.seconds)

    def exact(self, candidate) -> float:
        shares = np.array([self.space.share(i, o) for i, o in enumerate(self.space.disassemble(candidate))])
        return float(self.weights @ shares**2)

    def loss(self, candidate, fidelity: Fidelity) -> float:
        return self.exact(candidate) * (1 + 0.01 * self.rng.normal() / fidelity.n_tokens**0.5)

    def measure(self, text: str, fidelity: Fidelity) -> Measurement:
        candidate = self.space.parse(text)
        loss = self.loss(candidate, fidelity)
        seconds = float(self.rng.choice(self.seconds[fidelity.text]))
        values = {"loss": loss, "kl": loss, "ce": loss, **self.space.cost(candidate)}
        return Measurement(text, fidelity, values, n_tokens=fidelity.n_tokens, seconds=seconds, worker="s")


class Simulated(Executor):
    """Workers on a simulated clock."""

    def __init__(self, landscape: Landscape, n_workers: int) -> None:
        self.landscape = landscape
        self.n_workers = n_workers
        self.now = 0.0
        self.calls: list[tuple[float, float]] = []  # (start, end)
        self.last_submit = 0.0
        self.driver = 0.0
        self.flushes = 0
        self._free_at = np.zeros(n_workers)
        self._in_flight = np.zeros(n_workers, dtype=int)
        self._ends: list[tuple[float, int, int, Job, list[Measurement]]] = []
        self._n = 0
        self._since = time.process_time()

    n_free = property(lambda self: IN_FLIGHT * self.n_workers - len(self._ends))
    n_pending = property(lambda self: len(self._ends))
    job_size = property(lambda self: 1)
    worker_status = property(lambda self: WorkerStatus(self.n_workers, self.n_workers))

    def submit(self, job: Job) -> None:
        self._advance()
        paused = time.process_time()
        measured = [self.landscape.measure(text, job.fidelity) for text in job.candidates]
        worker = int(np.lexsort((self._free_at, self._in_flight))[0])
        start = max(self.now, self._free_at[worker])
        seconds = sum(m.seconds for m in measured)
        self.calls.append((start, start + seconds))
        self.last_submit = self.now
        self._free_at[worker] = start + seconds
        self._in_flight[worker] += 1
        self._n += 1
        heapq.heappush(self._ends, (start + seconds, self._n, worker, job, measured))
        self._since += time.process_time() - paused  # the simulation's own work is not the driver's

    def wait(self):
        self._advance()
        self.now = max(self.now, self._ends[0][0])
        done = []
        while self._ends and self._ends[0][0] <= self.now:
            _, _, worker, job, measured = heapq.heappop(self._ends)
            self._in_flight[worker] -= 1
            done.append((job, measured))
        self._since = time.process_time()
        return done

    def close(self) -> None:
        pass

    def _advance(self) -> None:
        spent = time.process_time() - self._since + FLUSH_S * self.flushes
        self.flushes = 0
        self.driver += spent
        self.now += spent
        self._since = time.process_time()


class Mirrored:
    """An observer that brings the mirror up to date as often as the mirror itself does."""

    def __init__(self, copy: OptunaCopy, executor: Simulated) -> None:
        self._copy = copy
        self._executor = executor
        self._last = 0.0

    def on_start(self, n_known, budget) -> None:
        pass

    def on_trials(self, trials, spent) -> None:
        if self._executor.now - self._last >= GATHER_S:
            self._copy.catch_up()
            self._last = self._executor.now

    def on_end(self, outcome) -> None:
        self._copy.catch_up()


def simulate(
    run,
    landscape: Landscape,
    n_workers: int,
    evaluations: int,
    seed: int,
    directory: Path,
    kind: str,
    **controller,
) -> dict:
    executor = Simulated(landscape, n_workers)

    def flush(fd: int) -> None:
        executor.flushes += 1

    of = run.settings
    fidelities = of.evaluator.search_fidelities
    row = CONTROLLERS[kind]
    settings = row.settings(kind=kind, **controller)
    real, os.fsync = os.fsync, flush
    try:
        with Study.open_or_create(directory, {"simulated": True}, About({"simulated": True})) as study:
            copy = OptunaCopy(
                study, landscape.space, run.objectives, fidelities[-1], storage_of(directory, None)
            )
            loop = Search(
                study,
                landscape.space.baselines(),
                row.build(landscape.space, fidelities, seed, settings),
                executor,
                Budget(evaluations=evaluations),
                fidelities[-1],
                asks=study.asks({"seed": seed}),
                locality_key=landscape.space.locality_key,
                observers=[Mirrored(copy, executor)],
            )
            loop.run()
            n_trials = len(study.trials)
            found = [t.measurement for t in study.trials if t.measurement.fidelity == fidelities[-1]]
            dense = landscape.space.baselines()["dense"].text
            best = min(m.values["loss"] for m in found if m.candidate != dense)
            [uniform] = [m.values["loss"] for m in found if m.candidate in _uniform(landscape.space)]
            history = found_after(study.trials, landscape, fidelities[-1])
    finally:
        os.fsync = real
    until = executor.last_submit  # after it the last calls run out, as at the end of any search
    worked = sum(end - start for start, end in executor.calls)
    before = sum(min(end, until) - min(start, until) for start, end in executor.calls)
    return {
        "workers": n_workers,
        "controller": {"kind": kind, **controller},
        "seed": seed,
        "trials": n_trials,
        "simulated_s": round(executor.now, 1),
        "busy": round(before / (n_workers * until), 4),
        "busy_with_the_end": round(worked / (n_workers * executor.now), 4),
        "driver_busy": round(executor.driver / executor.now, 4),
        "driver_ms_a_trial": round(1000 * executor.driver / n_trials, 3),
        "best_to_uniform": round(best / uniform, 4),
        "mean_call_s": round(worked / n_trials, 3),
        "found_after": history,
    }


def found_after(trials, landscape: Landscape, largest: Fidelity) -> dict[int, float]:
    """Exact loss of the best measured candidate, over the uniform one's, after 2^k evaluations and at the end."""
    dense, uniform = landscape.space.baselines().values()
    best, loss, after = float("inf"), 1.0, {}
    for number, trial in enumerate(trials, start=1):
        m = trial.measurement
        if m.fidelity == largest and m.candidate != dense.text and m.values["loss"] < best:
            best = m.values["loss"]
            loss = landscape.exact(landscape.space.parse(m.candidate)) / landscape.exact(uniform)
        if (number >= 64 and number & (number - 1) == 0) or number == len(trials):
            after[number] = round(loss, 4)
    return after


def _uniform(space) -> set[str]:
    return {candidate.text for name, candidate in space.baselines().items() if name != "dense"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--evaluations", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parents", type=int, default=1)
    parser.add_argument("--crossover", type=float)
    args = parser.parse_args()
    of = {"parents": args.parents, "crossover": args.crossover}
    run = open_run(args.run)
    for n_workers in args.workers:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                landscape = Landscape(run, np.random.default_rng(seed))
                directory = Path(scratch) / "run"
                row = simulate(
                    run, landscape, n_workers, args.evaluations, seed, directory, "evolution", **of
                )
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
