"""Slots of the space `architecture`: the cost removed by each option, and the totals that meet each target."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from secateur.spaces.architecture.cost import CostName, check_latency, dense_of, usage_of
from secateur.spaces.architecture.levels import BlockLevels, LevelRules, Slot, slots_of
from secateur.spaces.levels import check_ascending, finest_step, nearest_window, rounded_share
from secateur.spaces.mutation_crossover import ATTEMPTS, Levels, LevelVariation
from secateur.spaces.shape import ModelShape

UNIFORM_STEPS = 400  # shares tried for the uniform levels of a target


class SlotTargets:
    """Removable cost of each slot and option, in the target's unit.

    Args:
        shape: of the dense model, with its blocks.
        rules: for the levels.
        targets: shares of the blocks' `of` to remove, ascending; each is met to within half a level of the finest
            slot.
        of: quantity of the target.

    Raises:
        ValueError: if the rules don't fit the model, a target can't be met, or a latency is not known.
    """

    def __init__(self, shape: ModelShape, rules: LevelRules, targets: Sequence[float], of: CostName) -> None:
        check_ascending("target", targets)
        check_latency(shape, of)
        self._shape, self._of = shape, of
        self._units = ", ".join(sorted(rules.units))
        self.targets = tuple(targets)
        self.dense = tuple(map(dense_of, shape.blocks))
        slots = slots_of(rules.levels(shape), rules.units, shape.blocks)
        rows = dict(self._ascending(slot, self._row(slot)) for slot in slots)
        self.slots = tuple(slot for slot, row in rows.items() if row[-1])  # slots without cost stay dense
        self.table = tuple(rows[slot] for slot in self.slots)
        self.shares = tuple(
            np.array(slot.shares) for slot in self.slots
        )  # of each slot, removed by its options
        if not self.slots:
            raise ValueError(
                f"Expected `units` that can be removed and count in {of}, got {self._units}. Name others, or protect "
                f"fewer blocks."
            )
        self.n_total = sum(usage_of(of)(shape, *pair) for pair in zip(shape.blocks, self.dense, strict=True))
        self._step = finest_step(self.table)
        self.windows = tuple(nearest_window(rounded_share(t, self.n_total), self._step) for t in targets)
        self._check_targets()

    @cached_property
    def levels(self) -> tuple[BlockLevels, ...]:
        levels = [BlockLevels((dense.kv_groups,), (dense.ffn,)) for dense in self.dense]
        for slot in self.slots:
            before = levels[slot.block]
            levels[slot.block] = BlockLevels(
                tuple(dict.fromkeys(slot.kv_groups)) or before.kv_groups,
                tuple(dict.fromkeys(slot.ffn)) or before.ffn,
                tuple(dict.fromkeys(slot.queries)) or before.queries,
                tuple(dict.fromkeys(slot.channels)) or before.channels,
                slot.shared or before.shared,
            )
        return tuple(levels)

    def _row(self, slot: Slot) -> tuple[int, ...]:
        """Cost removed by each option of the slot."""
        block, dense = self._shape.blocks[slot.block], self.dense[slot.block]
        kept = [slot.kept(option, dense) for option in range(slot.n_options)]
        usages = [usage_of(self._of)(self._shape, block, each) for each in kept]
        return tuple(usages[0] - usage for usage in usages)

    def _ascending(self, slot: Slot, row: tuple[int, ...]) -> tuple[Slot, tuple[int, ...]]:
        """The slot in the order of the cost, without options of parts of units that cost as much as all of them."""
        units, parts = (slot.kv_groups, slot.queries) if slot.queries else (slot.ffn, slot.channels)
        if not parts:
            return slot, row
        whole = {(units[i], row[i]) for i, part in enumerate(parts) if not part}
        useful = [i for i, part in enumerate(parts) if not part or (units[i], row[i]) not in whole]
        order = sorted(useful, key=lambda i: row[i])
        held = {name: getattr(slot, name) for name in ("kv_groups", "queries", "ffn", "channels", "gone")}
        reordered: dict[str, Any] = {n: tuple(x[i] for i in order) for n, x in held.items() if x}
        ordered = replace(slot, **reordered)
        return ordered, tuple(row[i] for i in order)

    def _check_targets(self) -> None:
        highest = sum(row[-1] for row in self.table)
        for target, (share, bounds) in enumerate(zip(self.targets, self.windows, strict=True)):
            if bounds.low > highest or (share and bounds.low <= 0):
                raise ValueError(
                    f"Expected `target` from {(self._step // 2 + 1) / self.n_total:.2g} to "
                    f"{highest / self.n_total:.4g} (what {self._units} can remove of the blocks' {self._of}), got "
                    f"{share:g}. Choose another target or more `units`, or protect fewer blocks."
                )
            if target and bounds.low <= self.windows[target - 1].high:
                raise ValueError(
                    f"Expected targets that the levels tell apart ({self._step / self.n_total:.2g}), got "
                    f"{self.targets[target - 1]:.10g} and {share:.10g}. Use fewer targets, or a smaller `ffn_step`."
                )

    def uniform(self, target: int) -> Levels:
        """The most uniform levels that meet the target.

        The same share is removed of all slots; rounding errors are carried over to the next slot of the same kind.

        Raises:
            ValueError: if no levels meet it.
        """
        window = self.windows[target]
        variation = LevelVariation(self.table, [window], ())
        middle = (window.low + window.high) // 2

        def removed(step: int) -> int:
            return variation.total(self._diffused(step / UNIFORM_STEPS))

        above = bisect_left(range(UNIFORM_STEPS), middle, key=removed)  # nearly monotone in the share
        step = min((max(above - 1, 0), above), key=lambda step: abs(removed(step) - middle))
        nearest = self._diffused(step / UNIFORM_STEPS)
        for seed in range(ATTEMPTS):
            levels = variation.settle(nearest, 0, np.random.default_rng(seed))
            if levels is not None:
                return levels
        raise ValueError(
            f"Expected a `target` that the levels of {len(self.slots)} slots can meet to within "
            f"{self._step / 2 / self.n_total:.2g}, got {self.targets[target]:g}. The nearest is "
            f"{variation.total(nearest) / self.n_total:.4g}; or choose a smaller `ffn_step`, or more `units`."
        )

    def _diffused(self, share: float) -> Levels:
        """Levels that remove this share, with rounding errors carried from slot to slot of a kind."""
        levels, errors = [], dict[str, float]()
        for slot, shares in zip(self.slots, self.shares, strict=True):
            wanted = share + errors.get(slot.kind, 0.0)
            level = int(np.abs(shares - wanted).argmin())
            errors[slot.kind] = min(max(wanted - float(shares[level]), -1.0), 1.0)
            levels.append(level)
        return tuple(levels)
