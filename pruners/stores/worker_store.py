"""Store with a file for each block, built by several workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class WorkerStore:
    """Store of which each worker builds a range of blocks, from the dense model's activations alone.

    Args:
        directory: of its files.
        tokens: windows that the activations are computed on; None: the calibration set.
        doing: what workers do, in two words, for progress.
    """

    directory: Path
    tokens: Int[Tensor, "windows length"] | None = None
    doing: str = "building levels"
