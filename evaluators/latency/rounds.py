"""Several subjects timed in turns, so that a slower phase of the machine slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from secateur.evaluators.latency.clock import Call, Clock, Reading

MIN_ROUNDS = 10
ROUNDS = 20
"""Default number of rounds."""


Subject = Callable[[], AbstractContextManager[Call]]
"""Prepares a call, to be made once while the context lasts."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)

    def times(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Timing:
    """One subject over all rounds.

    Args:
        ms: milliseconds.
        ratio: to the reference in the same round.
        cpu_ms: processor time in milliseconds, over all threads.
    """

    ms: Spread
    ratio: Spread
    cpu_ms: Spread


def time_in_turns(
    subjects: Mapping[str, Subject],
    clock: Clock,
    *,
    rounds: int = ROUNDS,
    of: str = "wall",
    seed: int = 0,
) -> dict[str, Timing]:
    """Time every subject once a round, in random order; the first subject is the reference.

    One call at a time: a second one would find its weights in the processor's cache, where those of a whole model
    have no room. Milliseconds are the reference's median times the median of the subject's ratio to it, which a
    machine that is slower in some rounds disturbs less than plain medians.

    Args:
        subjects: by name; called twice before the first round, to warm up.
        clock: of the device.
        rounds: at least `MIN_ROUNDS`.
        of: the time that counts, ``wall`` or ``cpu``.
        seed: of the orders.

    Raises:
        ValueError: if there are too few rounds.
    """
    check_rounds(rounds)
    names, rng = list(subjects), np.random.default_rng(seed)

    def read(name: str) -> Reading:
        with subjects[name]() as call:
            return clock(call)

    for name in 2 * names:
        read(name)  # first calls allocate memory and choose kernels
    readings: dict[str, list[Reading]] = {name: [] for name in names}
    for _ in range(rounds):
        for i in rng.permutation(len(names)):
            readings[names[i]].append(read(names[i]))
    times = {name: [getattr(reading, f"{of}_ms") for reading in found] for name, found in readings.items()}
    reference = times[names[0]]
    anchor = Spread.of(reference).median
    timings = {}
    for name in names:
        ratio = Spread.of([a / b for a, b in zip(times[name], reference, strict=True)])
        cpu = Spread.of([reading.cpu_ms for reading in readings[name]])
        timings[name] = Timing(ratio.times(anchor) if name != names[0] else Spread.of(reference), ratio, cpu)
    return timings


def check_rounds(rounds: int) -> None:
    """Raise a ValueError for too few rounds."""
    if rounds < MIN_ROUNDS:
        raise ValueError(
            f"Expected `rounds` >= {MIN_ROUNDS}, got {rounds}. Fewer say little on a busy machine."
        )
