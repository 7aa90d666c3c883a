"""Generators, events, streams and graphs of devices, with a log of what was called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from tests.stand_in.labels import CPU, normal


class _Generators(type(torch.Generator)):  # type: ignore[misc]
    """Type of `Generator`: annotations that were read while it stood in fit all generators."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Generator.__base__)


class Generator(torch.Generator, metaclass=_Generators):
    """Generator of random numbers on a device."""

    on = CPU

    def __new__(cls, device: Any = "cpu") -> Generator:
        made: Generator = super().__new__(cls, "cpu")
        made.on = normal(device)
        return made


class Event:
    """Event of a stream; its time is the number of the call that recorded it."""

    log: ClassVar[list[str]] = []
    clock = 0.0

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        Event.clock += 1.0
        self.at = Event.clock
        Event.log.append("record")

    def wait(self, stream: Any = None) -> None:
        Event.log.append("wait for event")

    def synchronize(self) -> None:
        Event.log.append("synchronize event")

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Graph:
    """CUDA graph: keeps what was called while it was captured; a replay makes no call of Python."""

    def replay(self) -> None:
        Event.log.append("replay")


class Stream:
    """Stream of a device."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        Event.log.append("wait for stream")

    def wait_event(self, event: Any) -> None:
        Event.log.append("wait for event")

    def synchronize(self) -> None:
        Event.log.append("synchronize stream")


@contextmanager
def capture(graph: Graph, **_: Any) -> Iterator[None]:
    """Context that captures a graph."""
    Event.log.append("capture")
    yield
    Event.log.append("captured")
