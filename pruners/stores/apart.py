"""Stores of a file a block that workers build, each some blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class StoreApart:
    """Store whose blocks are built apart from others, of the dense model's activations alone.

    Args:
        directory: of its files.
        tokens: that the activations are computed on; None: those of the calibration set.
        doing: work on it in two words, for progress.
    """

    directory: Path
    tokens: Int[Tensor, "windows length"] | None = None
    doing: str = "building levels"
