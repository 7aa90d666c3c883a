"""Forecast of a command: what it will hold where, and its work, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Phase = Literal["load", "prepare", "search", "prune", "test", "train", "export"]
Where = Literal["host", "device", "disk"]
PROCESS = "Python and libraries"
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Holding:
    """Something that is held for a while.

    Args:
        name: of it.
        where: memory of the host, memory of the device, or disk; what a device holds is the host's where the device is
            the CPU.
        n_bytes: of one copy, in bytes.
        during: phases in which it is held.
        why: what decides its size.
        setting: keys or options that change it.
        copies: processes with a copy of their own; 0: as the driver holds it.
        mapped: pages of files, which the system takes back where memory is short.
    """

    name: str
    where: Where
    n_bytes: int
    during: tuple[Phase, ...]
    why: str = ""
    setting: str = ""
    copies: int = 0
    mapped: bool = False

    @property
    def all_bytes(self) -> int:
        """Bytes of all copies."""
        return self.n_bytes * max(1, self.copies)


@dataclass(frozen=True)
class Work:
    """A step of a command.

    Args:
        name: of it.
        seconds: expected; None: not timed.
        tokens: that go through the model, each step of a training once.
        why: what decides it.
        setting: keys or options that change it.
    """

    name: str
    seconds: float | None
    tokens: int = 0
    why: str = ""
    setting: str = ""


@dataclass(frozen=True)
class Forecast:
    """Forecast of a command: its holdings in each place, and its work.

    Args:
        subject: facts about model and command, by name.
        device: name of the device; ``cpu``: the host's memory is the device's.
        holdings: all that is held.
        work: all steps, in order.
        room: free bytes by place, where they are known.
        calibrated: what the times were measured on; "": nothing was timed.
        notes: what the forecast leaves out.
        streamed: forecast of the same command with the model streamed; None: it is this one, or there is none.
    """

    subject: Mapping[str, Any]
    device: str
    holdings: tuple[Holding, ...]
    work: tuple[Work, ...]
    room: Mapping[str, int] = field(default_factory=dict)
    calibrated: str = ""
    notes: tuple[str, ...] = ()
    streamed: Forecast | None = None

    def held(self, where: Where, phase: Phase) -> list[Holding]:
        """Holdings in a place and a phase, the largest first."""
        found = [x for x in self.holdings if self._place(x) == where and phase in x.during and x.n_bytes]
        return sorted(found, key=lambda x: -x.all_bytes)

    def _place(self, held: Holding) -> Where:
        return "host" if held.where == "device" and self.device == "cpu" else held.where

    def peak(self, where: Where, *, driver: bool = False, needed: bool = False) -> tuple[int, Phase]:
        """Largest number of bytes that is held there at a time, and the phase of it.

        Args:
            driver: of the driver's process alone.
            needed: without mapped pages, which the system can take back.
        """
        phases = [phase for phase in PHASES if any(phase in x.during for x in self.holdings)] or ["load"]

        def total(phase: Phase) -> int:
            found = [x for x in self.held(where, phase) if not (needed and x.mapped)]
            if driver:
                return sum(x.n_bytes for x in found if not x.copies)
            return sum(x.all_bytes for x in found)

        return max(((total(phase), phase) for phase in phases), key=lambda pair: pair[0])

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(x.tokens for x in self.work)

    @property
    def seconds(self) -> float | None:
        """Time of all steps; None if one was not timed."""
        known = [x.seconds for x in self.work if x.seconds is not None]
        return sum(known) if known and len(known) == len(self.work) else None

    @property
    def left(self) -> int:
        """Bytes on the disk that stay when the command is done: those of its last phase."""
        of_command = [x for x in self.holdings if x.name != PROCESS]
        last = [phase for phase in PHASES if any(phase in x.during for x in of_command)][-1:]
        return sum(x.all_bytes for phase in last for x in self.held("disk", phase))

    def too_large(self) -> tuple[Where, int, int] | None:
        """The place where more is held than is free: its name, the bytes needed and the free ones."""
        for where in ("host", "device", "disk"):
            free, needed = self.room.get(where), self.peak(where, needed=True)[0]
            if free is not None and needed > free:
                return where, needed, free
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values for programs, with the peaks."""
        places: Sequence[Where] = ("host", "device", "disk")
        return {
            **dict(self.subject),
            "device": self.device,
            "peak": {where: self.peak(where)[0] for where in places},
            "driver": self.peak("host", driver=True)[0],
            "left": self.left,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "holdings": [
                asdict(x) | {"during": list(x.during), "where": self._place(x)} for x in self.holdings
            ],
            "work": [asdict(x) for x in self.work],
            "room": dict(self.room),
            "calibrated": self.calibrated,
            "notes": list(self.notes),
            "streamed": self.streamed and {where: self.streamed.peak(where)[0] for where in places},
        }


def with_copies(holdings: Iterable[Holding], n_processes: int) -> list[Holding]:
    """The same in each of so many processes beside the driver."""
    return [Holding(**{**vars(x), "copies": n_processes}) for x in holdings]
