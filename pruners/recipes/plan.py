"""What a recipe comes to on one model: of each block what it becomes, and what the whole then costs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.pruners.recipes.live import LiveBlock
from secateur.spaces.architecture.candidate import Kept, KeptUnits

DENSE = ""
"""The key of a block that stays as it is."""


@dataclass(frozen=True)
class Decision(ABC):
    """Made from the dense model; its blocks can be changed one by one, in any order, without running the model.

    Args:
        keys: one a block; equal keys, of any decisions over the same calibration texts, are equal weights.
        costs: exact counts by their names, as spaces have them.
    """

    keys: tuple[str, ...]
    costs: Mapping[str, float]

    @abstractmethod
    def change(self, live: LiveBlock) -> None:
        """Make a block, which is dense now and has another key than `DENSE`, what was decided."""

    @property
    def sparsity(self) -> Mapping[str, float]:
        """Share of zeros of each projection by its full name; empty where none are left."""
        return {}

    @property
    @abstractmethod
    def kept(self) -> Sequence[Kept]:
        """How much of each block stays."""

    @property
    def units(self) -> Sequence[KeptUnits]:
        """Which units of each block stay; empty where none are cut off."""
        return ()


def key_of(*parts: Any) -> str:
    """A key for what these say; their texts are what they say."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
