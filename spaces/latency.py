"""Latency table: measured times of a model's sub-layers on one device, for predictions."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

PhaseName = Literal["prefill", "decode"]
PHASES: tuple[PhaseName, ...] = ("prefill", "decode")


def at_batch(name: str, batch: int | None) -> str:
    """Name of a phase or value at a further batch size, e.g. ``decode@8``; None: as it is, at the first batch size."""
    return name if batch is None else f"{name}@{batch}"


def phase_of(name: str) -> tuple[PhaseName, int | None] | None:
    """Phase and further batch size of a latency such as ``latency_decode@8``; None of another name."""
    found = re.fullmatch(r"latency_(prefill|decode)(?:@([1-9][0-9]{0,8}))?", name)
    if found is None:
        return None
    phase: PhaseName = "prefill" if found[1] == "prefill" else "decode"
    return phase, int(found[2]) if found[2] else None


def measuring_command(name: str) -> str:
    """Command that measures a latency such as ``latency_decode@8``, at its batch size."""
    found = phase_of(name)
    batch = None if found is None else found[1]
    return "secateur latency MODEL" + ("" if batch is None else f" --batch {batch}")


@dataclass(frozen=True)
class Phase:
    """Times of one phase, made monotone: a smaller sub-layer measured as slower than a larger one is noise.

    Args:
        rest_ms: time outside of the blocks (embedding, head, ...).
        attention_ms: time of one attention sub-layer by its number of KV groups, from 0 to all.
        ffn: (width, milliseconds) of one MLP, widths ascending from 0 (removed) to the full width; linear
            interpolation between them.

    Raises:
        ValueError: if a time is negative or not finite, or the widths don't ascend from 0.
    """

    rest_ms: float
    attention_ms: tuple[float, ...]
    ffn: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        for ms in (self.rest_ms, *self.attention_ms, *(ms for _, ms in self.ffn)):
            if not 0 <= ms < math.inf:
                raise ValueError(f"Expected times >= 0 in a latency table, got {ms} ms. Measure it again.")
        widths = [width for width, _ in self.ffn]
        if len(widths) < 2 or widths[0] != 0 or any(a >= b for a, b in pairwise(widths)):
            raise ValueError(f"Expected widths that ascend from 0 in a latency table, got {widths}.")
        if len(self.attention_ms) < 2:
            raise ValueError(
                f"Expected a time for 0 KV groups and for each number of them, got {len(self.attention_ms)}."
            )

    def attention(self, kv_groups: int) -> float:
        """Milliseconds of an attention sub-layer with this number of KV groups."""
        return min(self.attention_ms[kv_groups:])

    def mlp(self, width: int) -> float:
        """Milliseconds of an MLP with this number of channels."""
        right = bisect_left(self.ffn, width, key=lambda point: point[0])
        above = min(ms for _, ms in self.ffn[right:])
        if self.ffn[right][0] == width:
            return above
        (low, ms_low), (high, ms_high) = self.ffn[right - 1], self.ffn[right]
        return min(above, ms_low + (ms_high - ms_low) * (width - low) / (high - low))


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of one model's sub-layers on one device.

    Args:
        key: of the device, the model's shape and the conditions of the measurement.
        phases: ``prefill`` and ``decode`` at the first batch size, and of each further one ``prefill@8`` and
            ``decode@8``.

    Raises:
        ValueError: if a phase is missing or unknown.
    """

    key: str
    phases: Mapping[str, Phase]

    def __post_init__(self) -> None:
        found = {phase_of(f"latency_{name}") for name in self.phases}
        batches = {None, *(known[1] for known in found if known is not None)}
        if found != {(phase, batch) for phase in PHASES for batch in batches}:
            raise ValueError(
                f"Expected the phases {', '.join(PHASES)} of a latency table, got {list(self.phases)}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> LatencyTable:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: if the values are not those of a table.
        """
        phases = {
            name: Phase(
                float(phase["rest_ms"]),
                tuple(map(float, phase["attention_ms"])),
                tuple((int(width), float(ms)) for width, ms in phase["ffn"]),
            )
            for name, phase in raw["phases"].items()
        }
        return cls(raw["key"], phases)
