"""How times are read: clocks, and rounds that take turns. No test asserts a time."""

from __future__ import annotations

import contextlib
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from secateur.evaluators.latency import clock as clock_module
from secateur.evaluators.latency.clock import Reading, clock_of, threads, time_on_cpu, time_on_cuda
from secateur.evaluators.latency.conditions import LatencySetup
from secateur.evaluators.latency.rounds import MIN_ROUNDS, time_in_turns
from tests.timing import FakeClock, FakeSubject


def test_each_subject_is_read_once_a_round_in_an_order_that_changes():
    subjects = {name: FakeSubject(ms).ready for name, ms in (("dense", 8.0), ("half", 4.0), ("small", 1.0))}
    clock = FakeClock(3)
    time_in_turns(subjects, clock, rounds=12)
    rounds = [tuple(clock.seen[i : i + 3]) for i in range(6, len(clock.seen), 3)]
    assert len(rounds) == 12
    assert {tuple(sorted(seen)) for seen in rounds} == {(1.0, 4.0, 8.0)}
    assert len(set(rounds)) > 3


def test_a_machine_that_slows_down_does_not_change_ratios():
    subjects = {"dense": FakeSubject(8.0).ready, "half": FakeSubject(4.0).ready}
    timings = time_in_turns(subjects, FakeClock(2, slowdown=1.5), rounds=11)
    assert asdict(timings["half"].ratio) == pytest.approx({"median": 0.5, "low": 0.5, "high": 0.5})
    assert timings["half"].ms.median == pytest.approx(0.5 * timings["dense"].ms.median)
    assert timings["dense"].ms.high > timings["dense"].ms.low
    assert timings["dense"].ratio.median == 1.0
    assert timings["half"].cpu_ms.median == 12.0


def test_processor_time_counts_where_it_is_asked_for():
    subjects = {"dense": FakeSubject(8.0).ready, "half": FakeSubject(4.0).ready}
    assert time_in_turns(subjects, FakeClock(2), of="cpu")["half"].ms.median == 12.0


def test_few_rounds_are_refused():
    with pytest.raises(ValueError, match=f"Expected `rounds` >= {MIN_ROUNDS}, got 3"):
        time_in_turns({"dense": FakeSubject(1.0).ready}, FakeClock(), rounds=3)


# --- clocks ---


def test_a_cpu_clock_makes_the_call_and_reads_both_times(monkeypatch):
    ticks = {"perf_counter": iter((1.0, 3.0)), "process_time": iter((5.0, 5.5))}
    times = SimpleNamespace(**{name: lambda found=found: next(found) for name, found in ticks.items()})
    monkeypatch.setattr(clock_module, "time", times)
    made = []
    reading = time_on_cpu(lambda: made.append(0))
    assert len(made) == 1
    assert reading == Reading(wall_ms=2000.0, cpu_ms=500.0)


def test_a_cuda_clock_reads_events_around_the_call(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 6.0

    @contextmanager
    def on(device):
        log.append(str(device))
        yield

    fake = SimpleNamespace(Event=Event, device=on, synchronize=lambda: log.append("wait"))
    monkeypatch.setattr(clock_module.torch, "cuda", fake)
    monkeypatch.setattr(clock_module, "_empty_cache", lambda device: log.append("empty"))
    reading = time_on_cuda(torch.device("cuda:1"), lambda: log.append("call"))
    assert reading.wall_ms == 6.0
    assert log == ["cuda:1", "empty", "wait", "record", "call", "record", "wait"]


def test_an_unknown_device_has_no_clock():
    assert clock_of(torch.device("cpu")) is time_on_cpu
    with pytest.raises(ValueError, match="Expected a `device` of cpu, cuda, got meta"):
        clock_of(torch.device("meta"))


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("changes", [{"batch": 0}, {"prompt": 0}, {"threads": 0}, {"clock": "sun"}])
def test_a_setup_out_of_range_is_refused(changes):
    with pytest.raises(ValueError, match=f"Expected `{next(iter(changes))}`"):
        LatencySetup(**changes)
