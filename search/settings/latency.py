"""Settings of predicted latencies."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.spaces.section import Section


class LatencySettings(Section):
    """Conditions of a table that ``secateur latency`` has measured, for latency objectives and targets.

    Args:
        batch: sequences at a time.
        prompt: tokens of each: computed at once in prefill, in the cache in decode.
        threads: on a CPU; None for all that the process may use.
        clock: ``wall`` or ``cpu``.
        table: file with a table, as ``secateur latency --json`` prints it on the target device; used in place of the
            user's cache.
    """

    batch: int = Field(default=1, gt=0)
    prompt: int = Field(default=512, gt=0)
    threads: int | None = Field(default=None, gt=0)
    clock: Literal["wall", "cpu"] = "wall"
    table: str | None = None
