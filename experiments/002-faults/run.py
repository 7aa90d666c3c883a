"""Kills parts of a running search, with ``kill -9``, and sees what is lost, what is noticed, and when.

    python run.py [worker node driver head raylet] [--evaluations 160] [--results results.jsonl]

A cluster of two Ray nodes on this machine, at 127.0.0.2 (the head; Ray connects the driver to this node) and at
127.0.0.3, with one CPU, a directory and ports of its own each. On it ``secateur search`` on `tiny` with two workers
is started anew for each fault, and hit when a third of its budget is measured. Needs the extra `ray`, and Linux.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from nodes import LIMIT_S, PERIOD_S, Cluster, kill, members

from secateur.search import app, cli
from secateur.search.executor import Executor
from secateur.search.study.journal import read_journal

SETTINGS = """
model: tiny
space: {kind: allocation, metric: wanda, target: 0.6}
controller: {kind: evolution, offspring: 8}
evaluator: {window: 256, calibration_tokens: 4096, fidelities: [512, 2048], test_tokens: 2048}
executor: {kind: ray, workers: 2}
"""
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
USUAL = {"loading", "building", "starting", "measuring", "searching:", "search"}  # first words of progress


# --- the driver ---


def drive(log: str, arguments: list[str]) -> None:
    """The command line itself, with a thread beside it that notes whenever the executor reports something new."""
    search = app.search

    def watch(executor: Executor) -> None:
        last = None
        with Path(log).open("a") as file:
            while True:
                staff = executor.worker_status
                if (now := (staff.workers, staff.lost)) != last:
                    last = now
                    document = [time.monotonic(), *now, list(staff.troubles)]
                    print(json.dumps(document), file=file, flush=True)
                time.sleep(PERIOD_S)

    def watched(*positional: Any, on_ready: Callable[..., None], **named: Any) -> Any:
        def ready(loop: Any, executor: Executor) -> None:
            on_ready(loop, executor)
            threading.Thread(target=watch, args=(executor,), daemon=True).start()

        return search(*positional, on_ready=ready, **named)

    app.search = watched
    sys.argv = ["secateur", *arguments]
    cli.main()


@dataclass
class Search:
    """A run, and the commands that work on it one after the other.

    Args:
        directory: of the run.
        arguments: of the command.
    """

    directory: Path
    arguments: list[str]
    driver: subprocess.Popen[bytes] | None = None
    sizes: list[tuple[float, int]] = field(
        default_factory=list
    )  # of measurements.jsonl in lines, when seen first

    @property
    def file(self) -> Path:
        return self.directory / "measurements.jsonl"

    @property
    def said(self) -> str:
        return (self.directory.parent / "said").read_text()

    def start(self) -> None:
        command = [sys.executable, __file__, "--drive", str(self.directory.parent / "staff"), *self.arguments]
        with (self.directory.parent / "said").open("ab") as said:
            self.driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)

    def look(self) -> int:
        """How many lines there are; when the number is new, it is noted."""
        n = self.file.read_bytes().count(b"\n") if self.file.exists() else 0
        if not self.sizes or self.sizes[-1][1] != n:
            self.sizes.append((time.monotonic(), n))
        return n

    def until(self, enough: Callable[[int], bool]) -> int | None:
        """Wait for a number of lines, or for the driver's end; its exit status if it has ended."""
        assert self.driver is not None
        end = time.monotonic() + LIMIT_S
        while (status := self.driver.poll()) is None and not enough(self.look()):
            if time.monotonic() > end:
                raise TimeoutError(f"nothing new for {LIMIT_S:g} s:\n{self.said}")
            time.sleep(PERIOD_S)
        self.look()
        return status

    def staff(self, since: float) -> list[tuple[float, int, int]]:
        """What the executor reported after a time: (when, workers that are ready, workers lost so far)."""
        rows = [json.loads(line) for line in (self.directory.parent / "staff").read_text().splitlines()]
        return [(at, ready, lost) for at, ready, lost, _ in rows if at >= since]

    def workers(self) -> list[str]:
        return [m.worker for m in read_journal(self.file).measurements]

    def first_line(self, since: float) -> float:
        """When the first measurement came after a time."""
        return next((at for at, _ in self.sizes if at > since), math.nan)

    def longest_gap(self, since: float, n: int) -> float:
        """Longest time between new measurements of the first n after a time, in seconds."""
        last = next(at for at, n_lines in self.sizes if n_lines >= n)
        times = [since, *(at for at, _ in self.sizes if since < at <= last)]
        return max(b - a for a, b in itertools.pairwise(times))


# --- faults ---


def hit_worker(search: Search, cluster: Cluster) -> None:
    pid = int(search.workers()[-1].rpartition(":")[2])
    kill([p for node in (cluster.head, cluster.other) for p in members(node.session) if p == pid])


def hit_node(search: Search, cluster: Cluster) -> None:
    cluster.other.kill()


def hit_driver(search: Search, cluster: Cluster) -> None:
    assert search.driver is not None
    search.driver.kill()


def hit_head(search: Search, cluster: Cluster) -> None:
    cluster.head.kill()


def hit_gcs(search: Search, cluster: Cluster) -> None:
    cluster.head.kill("gcs_server")


def hit_raylet(search: Search, cluster: Cluster) -> None:
    cluster.head.kill("raylet")


FAULTS = {
    "none": lambda search, cluster: None,
    "worker": hit_worker,
    "node": hit_node,
    "driver": hit_driver,
    "head": hit_head,
    "gcs": hit_gcs,
    "raylet": hit_raylet,
}


def measure(fault: str, n: int, cluster: Cluster, scratch: Path) -> dict[str, Any]:
    """One search, hit once, to its end."""
    cluster.start()
    settings = scratch / "settings.yaml"
    settings.write_text(f"{SETTINGS}budget: {{evaluations: {n}}}\n")
    (scratch / fault).mkdir()
    arguments = ["search", str(settings), "--run", str(scratch / fault / "run")]
    search = Search(scratch / fault / "run", [*arguments, "-o", f"executor.address={cluster.address}"])
    search.start()
    try:
        return hit(fault, n, cluster, search)
    finally:
        search.driver.kill()


def hit(fault: str, n: int, cluster: Cluster, search: Search) -> dict[str, Any]:
    """From a third of the search to its end; times are in seconds since the fault."""
    if search.until(lambda n_lines: n_lines >= n // 3) is not None:
        raise RuntimeError(search.said)
    began = time.monotonic()
    FAULTS[fault](search, cluster)
    before = search.file.read_bytes()

    def since(at: float) -> float:
        return round(at - began, 1)

    row: dict[str, Any] = {"fault": fault, "lines_before": before.count(b"\n")}
    if fault == "node":  # it comes back when half is measured
        search.until(lambda n_lines: n_lines >= n // 2)
        row["node_start"] = since(time.monotonic())
        starting = threading.Thread(target=cluster.start)
        starting.start()
        search.until(lambda n_lines: not starting.is_alive())
        row["node_back"] = since(time.monotonic())
    status = search.until(lambda n_lines: False)
    ended = time.monotonic()
    staff = search.staff(began)
    noticed = [at for at, _, lost in staff if lost]
    replaced = [at for at, ready, lost in staff if lost and ready == 2]
    row |= {"noticed": since(noticed[0])} if noticed else {}
    row |= {"replaced": since(replaced[0])} if replaced else {}
    if status == 0:
        row["longest_gap"] = round(search.longest_gap(began, n), 1)
    else:
        row |= {
            "exit_status": status,
            "ended": since(ended),
            "measured_after": search.look() - row["lines_before"],
        }
        row |= go_on(search, cluster)
    return row | check(search, before, n)


def go_on(search: Search, cluster: Cluster) -> dict[str, Any]:
    """The same command again, with the cluster up; times in seconds."""
    down = time.monotonic()
    cluster.start()
    again = time.monotonic()
    search.start()
    status = search.until(lambda n_lines: False)
    return {
        "cluster_start": round(again - down, 1),
        "again_exit_status": status,
        "again_first_measurement": round(search.first_line(again) - again, 1),
    }


def check(search: Search, before: bytes, n: int) -> dict[str, Any]:
    """Nothing lost, nothing twice, all done."""
    measurements = read_journal(search.file).measurements
    keys = Counter(m.key for m in measurements)
    found = sum(1 for m in measurements if m.fidelity.part == "search")
    return {
        "kept": search.file.read_bytes().startswith(before),
        "twice": sum(count - 1 for count in keys.values()),
        "infeasible": sum(1 for m in measurements if m.infeasible is not None),
        "trials": found,
        "expected": n,
        "said": [line for line in search.said.splitlines() if line.split()[0] not in USUAL],
    }


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(FAULTS)}; default: all")
    parser.add_argument("--evaluations", type=int, default=160)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.jsonl")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    scratch = Path(tempfile.mkdtemp(prefix="rf", dir="/tmp"))  # Ray's sockets need short paths
    cluster = Cluster(scratch)
    about = {"cores": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__}
    try:
        for fault in args.faults or FAULTS:
            row = {"experiment": "faults", **measure(fault, args.evaluations, cluster, scratch), **about}
            print(json.dumps(row, indent=1), flush=True)
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    finally:
        cluster.stop()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
