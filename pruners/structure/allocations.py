"""Scores of units and blocks over the whole model, which known allocations start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AllocationScores:
    """Scores of the dense model on the calibration tokens that compare over all its blocks; higher = keep.

    Args:
        attention: for each block of each KV group, by number: standardised fluctuation, see `standardised_flap`.
        mlp: likewise of each channel.
        influence: of each block, see `shortgpt.block_influence`.
        blocks: scores of each block, by depth rule.
    """

    attention: tuple[tuple[float, ...], ...]
    mlp: tuple[tuple[float, ...], ...]
    influence: tuple[float, ...]
    blocks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
