"""What a worker's process does beside measuring."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from secateur.search.executors.cluster import worker
from secateur.search.executors.cluster.worker import TRIM_SECONDS, Worker, give_back_memory, keep_memory
from secateur.spaces.measurement import Fidelity, Measurement

FIDELITY = Fidelity("search", 8)


class Slow:
    """Takes two seconds of a clock that stands still otherwise."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def evaluate(self, candidates, fidelity):
        self._clock[0] += 2.0
        return [Measurement(text, fidelity, {"loss": 1.0}) for text in candidates]


def test_freed_memory_is_given_back_now_and_then(monkeypatch):
    clock, times = [100.0], []
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(worker, "keep_memory", lambda: None)
    monkeypatch.setattr(worker, "give_back_memory", lambda: times.append(clock[0]))
    actor = Worker(lambda directories: Slow(clock), [], None)
    name = actor.set_up()
    for _ in range(9):
        [found] = actor.evaluate(["a"], FIDELITY)
        assert found.worker == name
    assert times == [106.0, 112.0, 118.0], f"calls of 2 s, at most every {TRIM_SECONDS} s"


def test_memory_is_given_back_by_the_c_library(monkeypatch):
    asked = []
    monkeypatch.setattr(worker.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=asked.append))
    give_back_memory()
    assert asked == [0], "all that can be"


def test_a_c_library_that_can_not_is_no_error(monkeypatch):
    monkeypatch.setattr(worker.ctypes, "CDLL", lambda name: SimpleNamespace())
    keep_memory()
    give_back_memory()


def faults(prepare: str) -> int:
    """Pages that the system makes for a process that takes and frees the same memory again and again."""
    code = f"""
import resource
import numpy as np
from secateur.search.executors.cluster.worker import keep_memory
{prepare}
def use():
    return [np.ones(2**17) for _ in range(32)]  # 1 MiB each
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    return int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
def test_freed_memory_is_kept_for_the_next_candidate():
    assert faults("keep_memory()") < faults("") / 10
