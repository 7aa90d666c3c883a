"""Tensors in one safetensors file, under an identity: one text for all that they depend on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.spaces.whole_file import whole_file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], identity: str) -> None:
    """Write named tensors, whole or not at all.

    Raises:
        OSError, SafetensorError: if the file can't be written.
    """
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with whole_file(path) as new:
        save_file(contiguous, new, metadata={"identity": identity})


def load_tensors(path: Path, identity: str | None) -> dict[str, Tensor] | None:
    """Tensors saved under this identity, or under any if it is None, mapped; None if there are none."""
    try:
        with safe_open(path, framework="pt") as file:
            if identity is not None and (file.metadata() or {}).get("identity") != identity:
                return None
        return load_file(path)
    except (OSError, SafetensorError):
        return None
