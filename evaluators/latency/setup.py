"""Under which conditions latencies are measured."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LatencySetup:
    """What a latency depends on besides the model and the device.

    Args:
        batch: sequences at a time.
        prompt: tokens of each: computed at once in prefill, in the cache in decode.
        threads: that torch computes with on a CPU; None for all that this process may use.
        clock: ``wall``, or ``cpu``: processor time over the threads, for a machine that does other work too.

    Raises:
        ValueError: if a number is out of range.
    """

    batch: int = 1
    prompt: int = 512
    threads: int | None = None
    clock: str = "wall"

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` >= 1, got {value}.")
        if self.clock not in ("wall", "cpu"):
            raise ValueError(f"Expected `clock` wall or cpu, got {self.clock!r}.")

    @property
    def n_threads(self) -> int:
        """Threads on a CPU."""
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def options(self) -> str:
        """What differs from the defaults, as options of the command that measures."""
        default: dict[str, Any] = asdict(LatencySetup())
        changed = {name: value for name, value in asdict(self).items() if value != default[name]}
        return "".join(f" --{name} {value}" for name, value in changed.items())
