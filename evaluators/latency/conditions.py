"""Conditions of a latency: batch and prompt, device, precision, software and model shape."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from secateur.pruners.models.anatomy import Anatomy


@dataclass(frozen=True)
class LatencySetup:
    """Conditions besides the model and the device.

    Args:
        batch: sequences at a time.
        prompt: tokens of each: computed at once in prefill, in the cache in decode.
        threads: of torch on a CPU; None: all that this process may use.
        clock: ``wall``, or ``cpu``: processor time over the threads, for a machine that does other work too.
        eager: on a CUDA device, decode steps as `generate` of transformers makes them, where the device waits for
            Python; otherwise as servers do, by CUDA graphs.

    Raises:
        ValueError: if a number is out of range.
    """

    batch: int = 1
    prompt: int = 512
    threads: int | None = None
    clock: str = "wall"
    eager: bool = False

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
        """Differences from the defaults, as options of the command that measures."""
        return options_of([self])


def options_of(setups: Sequence[LatencySetup]) -> str:
    """Differences from the defaults, as options of the command that measures; the setups differ in the batch size."""
    default: dict[str, Any] = asdict(LatencySetup())
    asked = asdict(setups[0])
    if len(setups) > 1:
        asked["batch"] = ",".join(str(setup.batch) for setup in setups)
    changed = {name: value for name, value in asked.items() if value != default[name]}
    return "".join(f" --{name}" if value is True else f" --{name} {value}" for name, value in changed.items())


def setups_of(asked: Mapping[str, Any]) -> list[LatencySetup]:
    """Conditions for each batch size.

    Args:
        asked: arguments of `LatencySetup`; ``batch`` may be a list, or a text of sizes with commas between them.

    Raises:
        ValueError: if a number is out of range, or a batch size is named twice.
    """
    batch = asked.get("batch", LatencySetup.batch)
    named = batch.split(",") if isinstance(batch, str) else batch if isinstance(batch, Sequence) else [batch]
    try:
        sizes = [int(size) for size in named]
    except (TypeError, ValueError):
        sizes = []
    if not sizes or len(set(sizes)) < len(sizes):
        raise ValueError(f"Expected `batch` such as 1, or 1,8 with each size once, got {batch}.")
    return [LatencySetup(**{**asked, "batch": size}) for size in sizes]


def conditions(anatomy: Anatomy, setup: LatencySetup, device: torch.device | None = None) -> dict[str, Any]:
    """Conditions of the times in a table, as plain values for people and files.

    Args:
        device: of a model that is without memory; None: the model's.

    Raises:
        ValueError: if the model's blocks have several shapes.
    """
    device = device or anatomy.embedding.weight.device
    decode = {"decode": "eager" if setup.eager else "graph"} if device.type == "cuda" else {}
    return decode | {
        "device": device_name(device),
        "dtype": str(next(anatomy.linears).weight.dtype).removeprefix("torch."),
        "attention": getattr(anatomy.model.config, "_attn_implementation", None),
        "threads": setup.n_threads if device.type == "cpu" else None,
        "batch": setup.batch,
        "prompt": setup.prompt,
        "clock": setup.clock,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "shape": _shape(anatomy),
    }


def key_of(found: dict[str, Any]) -> str:
    """A short name of the conditions."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """The processor or accelerator, as it calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _shape(anatomy: Anatomy) -> dict[str, Any]:
    """Shape of a model, independent of its weights."""
    sizes = {(b.n_heads, b.n_kv_heads, b.head_dim, b.ffn_width) for b in anatomy.blocks}
    if len(sizes) > 1:
        raise ValueError(
            f"Expected blocks of one shape for a latency table, got {len(sizes)} shapes in {anatomy.family}. "
            f"Start from the dense model."
        )
    names = ("n_heads", "n_kv_heads", "head_dim", "ffn_width", "window")
    return {
        "family": anatomy.family,
        "width": anatomy.width,
        "vocabulary": anatomy.vocab_size,
        "blocks": [{name: getattr(block, name) for name in names} for block in anatomy.blocks],
        "projections": [linear.role for linear in anatomy.blocks[0].linears],
    }
