"""Published allocations by scores of the dense model, as levels: baselines and starting points of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from secateur.spaces.architecture.levels import Slot
from secateur.spaces.levels import Table, Window
from secateur.spaces.mutation_crossover import Levels


@dataclass(frozen=True)
class Scores:
    """Scores of the dense model on the calibration tokens, comparable over all its blocks; higher = keep.

    Args:
        attention: for each block of each KV group: standardised fluctuation, see `standardised_flap`.
        mlp: likewise of each channel.
        influence: of each block, see `shortgpt.block_influence`.
        blocks: scores of each block, by depth rule.
    """

    attention: Sequence[Sequence[float]]
    mlp: Sequence[Sequence[float]]
    influence: tuple[float, ...]
    blocks: Mapping[str, Sequence[float]] = field(default_factory=dict)


Move = Mapping[int, int]
"""Slots with their new levels, set at once."""


def unit_moves(slots: Sequence[Slot], scores: Scores) -> list[Move]:
    """Single levels in the order of a rising global threshold over all units' scores.

    FLAP's allocation (An et al. 2024, arXiv 2312.11983): one threshold for the standardised scores of all groups and
    channels, as high as their costs allow. Here each kept number is rounded to the nearest level. Query heads are not
    cut singly.
    """
    found = []
    for index, slot in enumerate(slots):
        if slot.kind == "block":
            continue
        of = scores.attention if slot.kind == "attention" else scores.mlp
        ascending, kept = sorted(of[slot.block]), slot.kv_groups or slot.ffn
        levels = [level for level in range(slot.n_options) if not (slot.queries and slot.queries[level])]
        for before, level in pairwise(levels):
            n_gone = math.ceil(len(ascending) - (kept[before] + kept[level]) / 2)  # nearer to this level
            found.append((ascending[n_gone - 1], index, level))
    return [{index: level} for _, index, level in sorted(found)]


def block_moves(slots: Sequence[Slot], of_blocks: Sequence[float]) -> list[Move]:
    """Whole blocks by ascending score, then single levels for the remainder.

    As ShortGPT (Men et al. 2024, arXiv 2403.03853) and other methods that remove whole blocks only: here the next
    block loses the missing rest, about the same share of attention and MLP. Empty if no block can be removed whole.
    """
    blocks: dict[int, list[int]] = {}
    for index, slot in enumerate(slots):
        blocks.setdefault(slot.block, []).append(index)
    order = sorted(blocks, key=lambda block: of_blocks[block])
    last = [slot.n_options - 1 for slot in slots]
    whole = [
        {i: last[i] for i in blocks[block]} for block in order if _is_whole([slots[i] for i in blocks[block]])
    ]
    levels = (
        sorted((slots[i].shares[level], i, level) for i in blocks[block] for level in range(1, last[i] + 1))
        for block in order
    )
    return [*whole, *({i: level} for row in levels for _, i, level in row)] if whole else []


def _is_whole(slots: Sequence[Slot]) -> bool:
    """True if the block is empty without these slots."""
    kinds = {slot.kind for slot in slots if slot.removable}
    return kinds >= {"attention", "mlp"} or "block" in kinds or any(x.alone and x.removable for x in slots)


def walk(table: Table, window: Window, moves: Sequence[Move]) -> Levels:
    """Levels after the moves, skipping those that would lower a level or exceed the window.

    Args:
        table: usage of each slot at each level.
        window: the walk ends as soon as the total reaches it.
        moves: in order, starting with all slots at level 0.
    """
    levels, total = [0] * len(table), 0
    for move in moves:
        if total >= window.low:
            break
        after = total + sum(table[i][level] - table[i][levels[i]] for i, level in move.items())
        if after <= window.high and all(level > levels[i] for i, level in move.items()):
            total = after
            for i, level in move.items():
                levels[i] = level
    return tuple(levels)
