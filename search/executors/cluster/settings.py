"""Settings of the executor `ray`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from secateur.spaces.section import Section

_ADDRESS = re.compile(r"[^\s:/]+:\d{1,5}")


class RaySettings(Section):
    """Settings of the executor `ray`.

    Args:
        address: None starts Ray on this machine; ``auto`` joins the cluster of this machine; ``host:port`` joins the
            cluster with this head.
        workers: number of workers; None: as many as the cluster has CPUs (and GPUs) for.
        cpus_per_worker: CPUs, and compute threads, of a worker.
        gpus_per_worker: GPUs of a worker; below 1 several workers share one, each with a copy of the model; above 1
            the model is spread over them.
        attempts: tries of a candidate that crashes its worker before it counts as infeasible.
        start_s: longest time in seconds without a ready worker, such as for a large model from a slow disk.
        timeout_s: longest time of a call in seconds, after which its worker counts as hung; None: no limit.
        batch: least number of candidates in flight over all workers or, in a deterministic search, in a round.
        deterministic: ask in rounds, as the local executor does: equal trials for equal seeds, whatever the number of
            workers; workers then wait for the end of each round.
    """

    kind: Literal["ray"] = "ray"
    address: str | None = None
    workers: int | None = Field(default=None, gt=0)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    attempts: int = Field(default=2, gt=0)
    start_s: float = Field(default=300, gt=0)
    timeout_s: float | None = Field(default=3600, gt=0)
    batch: int = Field(default=16, gt=0)
    deterministic: bool = False

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is not None and address != "auto" and not _ADDRESS.fullmatch(address):
            raise ValueError(f"Expected `address` to be null, auto or host:port, got {address!r}.")
        return address

    @field_validator("gpus_per_worker")
    @classmethod
    def _check_gpus(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"Expected `gpus_per_worker` below 1 or a whole number, got {gpus}.")
        return gpus

    @property
    def threads(self) -> None:
        """Threads of the driver: its numerical library's choice."""

    @property
    def worker_threads(self) -> int:
        """Compute threads of a worker."""
        return max(1, int(self.cpus_per_worker))
