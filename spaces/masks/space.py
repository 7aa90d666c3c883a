"""The space `masks`: kept units by name, which candidates inherit, vary and exchange."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.architecture.cost import CostName, cost
from secateur.spaces.architecture.levels import LevelRules, Slot
from secateur.spaces.architecture.slot_targets import SlotTargets
from secateur.spaces.masks.candidate import BlockMask, UnitMasks
from secateur.spaces.mutation_crossover import ATTEMPTS, Levels, LevelVariation
from secateur.spaces.shape import ModelShape
from secateur.spaces.space import Space

Mask = NDArray[np.bool_]
"""True for each kept unit of a slot."""

COUNT_MOVES = 0.5  # share of mutations that switch levels, too


class Variation(NamedTuple):
    """Rates of mutation.

    Args:
        rate: probability that the mask of a slot is drawn anew.
        similarity: least share of its units that a new mask keeps.
    """

    rate: float
    similarity: float


class MaskSpace(Space[UnitMasks]):
    """Masks over the KV groups and channels of each block, with the removed share held at a target.

    Search for Efficient LLMs (Shen et al. 2024, arXiv 2409.17372): candidates inherit which units they keep, not only
    how many. Mutation draws the masks of some slots anew, near to the old ones (algorithm 1); in half of the cases
    numbers of units are switched between slots first, as in `LevelVariation`. Crossover takes each slot's mask from
    either parent. Differences from the paper: every candidate meets the target, where there others are refused; a new
    mask is drawn with a uniform number of units in common, not by rejection; and all blocks remain.

    Costs: see `architecture.cost.cost`.

    Args:
        shape: of the dense model, with its blocks.
        run: neighbouring channels that are kept or removed together; None: about a 48th of the width.
        targets: shares of the blocks' `of` to remove, ascending.
        of: quantity of the target.
        variation: rates of mutation.

    Raises:
        ValueError: if `run` does not divide the width, or a target can't be met.
    """

    def __init__(
        self,
        shape: ModelShape,
        run: int | None,
        targets: Sequence[float],
        of: CostName,
        variation: Variation,
    ) -> None:
        rules = LevelRules(frozenset({"groups", "channels"}), ffn_step=run, n_steps=48)
        self._of_slots = SlotTargets(shape, rules, targets, of)
        self._shape = shape
        self._slots = self._of_slots.slots
        self._rate, self._similarity = variation
        for slot in self._slots:
            if slot.ffn and slot.ffn[0] % self._step_of(slot):
                raise ValueError(
                    f"Expected `channels` to divide the FFN width, got {self._step_of(slot)} for {slot.ffn[0]} "
                    f"channels at block {slot.block}. Choose a divisor."
                )
        uniform = [self._of_slots.uniform(target) for target in range(len(targets))]
        self._variation = LevelVariation(self._of_slots.table, self._of_slots.windows, uniform)
        self._uniform = [
            self._candidate([_spread(x, n) for x, n in self._counts(levels)]) for levels in uniform
        ]
        self._dense = self._candidate([np.ones(slot.n_options, dtype=bool) for slot in self._slots])
        self._further: dict[str, UnitMasks] = {}

    @staticmethod
    def _step_of(slot: Slot) -> int:
        """Channels of a run, or 1 KV group."""
        options = slot.kv_groups or slot.ffn
        return options[0] - options[1]

    def _counts(self, levels: Levels) -> list[tuple[int, int]]:
        """Numbers of kept and of all units of each slot; option k keeps all but k of them."""
        return [
            (slot.n_options - level, slot.n_options) for slot, level in zip(self._slots, levels, strict=True)
        ]

    # --- targets and text ---

    @property
    def targets(self) -> tuple[float, ...]:
        return self._of_slots.targets

    def baselines(self) -> dict[str, UnitMasks]:
        """The uniform ones keep the same share of all slots, evenly spread."""
        named = {"dense": self._dense}
        for target in range(len(self.targets)):
            named[self.named("uniform", target)] = self._uniform[target]
        return named | self._further

    def ranked_baselines(
        self, name: str, orders: Mapping[tuple[int, str], Sequence[int]]
    ) -> dict[str, UnitMasks]:
        """Masks of the uniform numbers of units, the first ones of an order: the paper's initialisation.

        Args:
            name: of the order.
            orders: units of each block and kind, ``attention`` or ``mlp``, the most important first.
        """
        found = {}
        for target in range(len(self.targets)):
            masks = []
            for slot, mask in zip(self._slots, self._masks(self._uniform[target]), strict=True):
                step, order = self._step_of(slot), orders[slot.block, slot.kind]
                ranks = np.empty(len(order))
                ranks[list(order)] = np.arange(len(order))
                by_run = ranks.reshape(len(mask), -1).mean(axis=1) if slot.ffn and step > 1 else ranks
                chosen = np.zeros(len(mask), dtype=bool)
                chosen[np.argsort(by_run, kind="stable")[: int(mask.sum())]] = True
                masks.append(chosen)
            found[self.named(name, target)] = self._candidate(masks)
        return found

    def with_baselines(self, named: Mapping[str, UnitMasks]) -> Self:
        """The same space with these baselines after the uniform ones."""
        other = copy(self)
        other._further = dict(named)
        return other

    def parse(self, text: str) -> UnitMasks:
        candidate = UnitMasks.parse(text)
        if len(candidate.blocks) != len(self._shape.blocks):
            raise ValueError(f"Expected {len(self._shape.blocks)} blocks, got {len(candidate.blocks)}.")
        for index, (mask, whole) in enumerate(zip(candidate.blocks, self._dense.blocks, strict=True)):
            for bits, all_bits in zip(mask, whole, strict=True):
                if not 0 < bits <= all_bits:
                    raise ValueError(
                        f"Expected some of {all_bits:x} as kept units, got {bits:x} at block {index}."
                    )
        return candidate

    def target_of(self, candidate: UnitMasks) -> int | None:
        return self._variation.target_of(self._levels(candidate))

    # --- variation ---

    def sample(self, rng: np.random.Generator, target: int) -> UnitMasks:
        """Numbers of units as in `LevelVariation.sample`, units at random."""
        levels = self._variation.sample(self._of_slots.shares, self.targets[target], target, rng)
        return self._candidate(
            [redrawn(np.ones(n, dtype=bool), k, 0.0, rng) for k, n in self._counts(levels)]
        )

    def mutate(self, candidate: UnitMasks, rng: np.random.Generator) -> UnitMasks:
        target, levels, masks = self._met_target(candidate), self._levels(candidate), self._masks(candidate)
        found = candidate
        for _ in range(ATTEMPTS):
            others = self._variation.mutate(levels, target, rng) if rng.random() < COUNT_MOVES else levels
            drawn = rng.random(len(masks)) < self._rate
            found = self._candidate(
                [
                    redrawn(mask, k, self._similarity, rng) if again or k != mask.sum() else mask
                    for mask, again, (k, _) in zip(masks, drawn, self._counts(others), strict=True)
                ]
            )
            if found != candidate:
                break
        return found

    def crossover(self, first: UnitMasks, second: UnitMasks, rng: np.random.Generator) -> UnitMasks:
        take = rng.random(len(self._slots)) < 0.5
        pairs = zip(take, self._masks(first), self._masks(second), strict=True)
        mixed = self._candidate([a if one else b for one, a, b in pairs])
        return self.repair(mixed, self._met_target(first), rng)

    def repair(self, candidate: UnitMasks, target: int, rng: np.random.Generator) -> UnitMasks:
        """Numbers of units as in `LevelVariation.repair`; slots lose or gain no more units than that takes."""
        levels = self._levels(candidate)
        found = self._variation.repair(levels, target, rng)
        if found is levels:
            return candidate
        pairs = zip(self._masks(candidate), self._counts(found), strict=True)
        return self._candidate([redrawn(mask, k, 1.0, rng) for mask, (k, _) in pairs])

    # --- meaning of a candidate ---

    def kept(self, candidate: UnitMasks) -> tuple[Kept, ...]:
        """Numbers of kept units of each block."""
        blocks = list(self._of_slots.dense)
        for slot, level in zip(self._slots, self._levels(candidate), strict=True):
            blocks[slot.block] = slot.kept(level, blocks[slot.block])
        return tuple(blocks)

    def cost(self, candidate: UnitMasks) -> Mapping[str, float]:
        return cost(self._shape, self.kept(candidate))

    def config(self, candidate: UnitMasks) -> Mapping[str, Any]:
        """Of each block numbers and units.

        ``{"blocks": [{"kv_groups": 2, "ffn": 1024}, ...], "units": [{"kv_groups": [0, 2], "channels": [...]}, ...]}``
        """
        units = [
            {"kv_groups": list(range(dense.kv_groups)), "channels": list(range(dense.ffn))}
            for dense in self._of_slots.dense
        ]
        for slot, mask in zip(self._slots, self._masks(candidate), strict=True):
            step = self._step_of(slot) if slot.ffn else 1
            chosen = np.flatnonzero(np.repeat(mask, step)).tolist()
            units[slot.block]["channels" if slot.ffn else "kv_groups"] = chosen
        return {"blocks": [kept.plain for kept in self.kept(candidate)], "units": units}

    def locality_key(self, candidate: UnitMasks) -> Any:
        return candidate.blocks

    # --- helpers ---

    def _levels(self, candidate: UnitMasks) -> Levels:
        """Option of each slot: its number of removed units."""
        return tuple(slot.n_options - self._bits(candidate, slot).bit_count() for slot in self._slots)

    @staticmethod
    def _bits(candidate: UnitMasks, slot: Slot) -> int:
        block = candidate.blocks[slot.block]
        return block.channels if slot.ffn else block.kv_groups

    def _masks(self, candidate: UnitMasks) -> list[Mask]:
        return [
            np.array([self._bits(candidate, slot) >> unit & 1 for unit in range(slot.n_options)], dtype=bool)
            for slot in self._slots
        ]

    def _candidate(self, masks: Sequence[Mask]) -> UnitMasks:
        blocks = [BlockMask(1, 1)] * len(self._shape.blocks)
        for slot, mask in zip(self._slots, masks, strict=True):
            bits = sum(1 << unit for unit in np.flatnonzero(mask).tolist())
            of = "channels" if slot.ffn else "kv_groups"
            blocks[slot.block] = blocks[slot.block]._replace(**{of: bits})
        return UnitMasks(tuple(blocks))


def _spread(n_kept: int, n_units: int) -> Mask:
    """So many units, evenly spread."""
    mask = np.zeros(n_units, dtype=bool)
    mask[np.arange(n_kept) * n_units // n_kept] = True
    return mask


def redrawn(mask: Mask, n_kept: int, similarity: float, rng: np.random.Generator) -> Mask:
    """A random mask of so many units, with at least a share of the units that it can have in common with the old one.

    The number of common units is uniform among those that are possible.
    """
    on, off = np.flatnonzero(mask), np.flatnonzero(~mask)
    most = min(len(on), n_kept)
    least = max(math.ceil(similarity * most), n_kept - len(off))
    n_same = int(rng.integers(least, most + 1))
    new = np.zeros(len(mask), dtype=bool)
    new[rng.choice(on, n_same, replace=False)] = True
    new[rng.choice(off, n_kept - n_same, replace=False)] = True
    return new
