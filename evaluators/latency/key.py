"""What a latency table belongs to: device, precision, software, model shape and conditions."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from secateur.evaluators.latency.setup import LatencySetup
from secateur.pruners.models.anatomy import Anatomy


def conditions(anatomy: Anatomy, setup: LatencySetup) -> dict[str, Any]:
    """Everything that the times in a table depend on, as plain values for people and files.

    Raises:
        ValueError: if the model's blocks have several shapes.
    """
    device = anatomy.embedding.weight.device
    return {
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


_OF_BLOCKS = ("n_heads", "n_kv_heads", "head_dim", "ffn_width", "window")


def _shape(anatomy: Anatomy) -> dict[str, Any]:
    """Of the model, whatever its weights."""
    sizes = {(b.n_heads, b.n_kv_heads, b.head_dim, b.ffn_width) for b in anatomy.blocks}
    if len(sizes) > 1:
        raise ValueError(
            f"Expected blocks of one shape for a latency table, got {len(sizes)} shapes in {anatomy.family}. "
            f"Start from the dense model."
        )
    return {
        "family": anatomy.family,
        "width": anatomy.width,
        "vocabulary": anatomy.vocab_size,
        "blocks": [{name: getattr(block, name) for name in _OF_BLOCKS} for block in anatomy.blocks],
        "projections": [linear.role for linear in anatomy.blocks[0].linears],
    }
