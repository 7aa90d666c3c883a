"""What a worker's process does beside measuring."""

from __future__ import annotations

from types import SimpleNamespace

from secateur.search.executors.cluster import worker
from secateur.search.executors.cluster.worker import TRIM_SECONDS, Worker, give_back_memory
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
    give_back_memory()
