"""The space `architecture`: numbers of KV groups and FFN channels of each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur.spaces.architecture.candidate import Architecture
from secateur.spaces.architecture.cost import CostName
from secateur.spaces.architecture.levels import BlockLevels, LevelRules, Slot
from secateur.spaces.architecture.scores import Scores, block_moves, unit_moves, walk
from secateur.spaces.architecture.slot_targets import SlotTargets
from secateur.spaces.architecture.structured import StructuredSpace
from secateur.spaces.methods import DEPTH
from secateur.spaces.mutation_crossover import ATTEMPTS, Levels, LevelVariation, first_behind
from secateur.spaces.shape import ModelShape
from secateur.spaces.space import SeparableSpace

DEPTH_MOVES = 0.25  # share of mutations that remove, restore or exchange whole sub-layers or blocks


class ArchitectureSpace(StructuredSpace, SeparableSpace[Architecture]):
    """Numbers of KV groups and FFN channels for each block, with the removed share held at a target.

    Mutation and crossover as in `LevelVariation`, with levels weighted by their cost: DarwinLM's level switch (arXiv
    2502.07780), but the split between attention and MLP is searched too; and depth moves, which remove or restore a
    whole sub-layer or block. Slots are the sub-layers, or the blocks if only these are removable; and the repair, if
    there are several. With switches between alike slots mutation is DarwinLM's: attentions and MLPs keep their totals.

    Costs: see `cost.cost`.

    Args:
        shape: of the dense model, with its blocks.
        rules: for the levels.
        targets: shares of the blocks' `of` to remove, ascending, each met to within half a level of the finest slot.
        of: quantity of the target.
        repairs: compensations for removed weights.
        alike: whether mutations switch levels between slots of one kind alone, without depth moves.

    Raises:
        ValueError: if the rules don't fit the model, a target can't be met, or a latency is not known.
    """

    def __init__(
        self,
        shape: ModelShape,
        rules: LevelRules,
        targets: Sequence[float],
        of: CostName = "params",
        repairs: Sequence[str] = ("none",),
        *,
        alike: bool = False,
    ) -> None:
        self._of_slots = SlotTargets(shape, rules, targets, of)
        super().__init__(shape, repairs, self._of_slots)
        self._slots, self._table = self._of_slots.slots, self._of_slots.table
        self._uniform = [self._of_slots.uniform(target) for target in range(len(targets))]
        self._variation = LevelVariation(self._table, self._of_slots.windows, self._uniform)
        self._groups = _groups(self._slots, together="blocks" in rules.units)
        kinds = {slot.kind for slot in self._slots} if alike else set()
        self._kinds = [[i for i, x in enumerate(self._slots) if x.kind == kind] for kind in sorted(kinds)]

    # --- targets ---

    def target_of(self, candidate: Architecture) -> int | None:
        return self._variation.target_of(self._levels_of(candidate))

    @property
    def dense(self) -> Architecture:
        return self._architecture((0,) * len(self._slots))

    def uniform(self, target: int) -> Architecture:
        """The same share removed of all slots, see `SlotTargets.uniform`."""
        return self._architecture(self._uniform[target])

    def from_scores(self, kind: str, scores: Scores, target: int) -> Architecture | None:
        """See `block_moves` and `unit_moves`; a remaining difference to the target is closed by random moves."""
        by_block = scores.blocks[kind] if kind in DEPTH else None
        moves = unit_moves(self._slots, scores) if by_block is None else block_moves(self._slots, by_block)
        levels = walk(self._table, self._of_slots.windows[target], moves)
        found = self._variation.settle(levels, target, np.random.default_rng(0)) if any(levels) else None
        return None if found is None else self._architecture(found)

    # --- variation ---

    def sample(self, rng: np.random.Generator, target: int) -> Architecture:
        """As `LevelVariation.sample`, with any repair."""
        repair = int(rng.integers(len(self.repairs))) if len(self.repairs) > 1 else 0
        levels = self._variation.sample(self._of_slots.shares, self.targets[target], target, rng)
        return self._architecture(levels, repair)

    def mutate(self, candidate: Architecture, rng: np.random.Generator) -> Architecture:
        """Depth moves (a quarter) or level switches, or switches alone; a few mutations change the repair alone."""
        target, levels = self._met_target(candidate), self._levels_of(candidate)
        repair, n_repairs = self._repair_of(candidate), len(self.repairs)
        other = self._other_repair(repair, rng)
        if other is not None:
            return self._architecture(levels, other)
        if not self._kinds and self._groups and rng.random() < DEPTH_MOVES:
            for _ in range(ATTEMPTS):
                found = self._depth_move(levels, target, rng)
                if found is not None:
                    return self._architecture(found, repair)
        if self._kinds:
            found = self._variation.switch_alike(levels, target, self._kinds, rng)
        else:
            found = self._variation.mutate(levels, target, rng)
        if found == levels and n_repairs > 1:
            return self._architecture(levels, (repair + 1) % n_repairs)
        return self._architecture(found, repair)

    def mutate_after(self, candidate: Architecture, depth: float, rng: np.random.Generator) -> Architecture:
        """Level switches with the repair of the candidate; of one kind, and in any block, where all mutations are."""
        if self._kinds:
            return self.mutate(candidate, rng)
        target, levels = self._met_target(candidate), self._levels_of(candidate)
        first = first_behind(depth, [slot.block for slot in self._slots])
        found = self._variation.mutate(levels, target, rng, first)
        return self._architecture(found, self._repair_of(candidate))

    def _depth_move(self, levels: Levels, target: int, rng: np.random.Generator) -> Levels | None:
        """Remove, restore or exchange a group of slots; other slots close the difference to the target."""
        group = self._groups[rng.integers(len(self._groups))]
        gone = self._is_gone(group, levels)
        if rng.random() < 0.5:
            alike = (other for other in self._groups if self._kind(other) == self._kind(group))
            others = [other for other in alike if self._is_gone(other, levels) != gone]
            if others:
                other = others[rng.integers(len(others))]
                pairs = list(zip(group, other, strict=True))
                jumps = {a: levels[b] for a, b in pairs} | {b: levels[a] for a, b in pairs}
                return self._variation.jump(levels, target, jumps, rng)
        last = {i: len(self._table[i]) - 1 for i in group}
        jumps = {i: int(rng.integers(end)) for i, end in last.items()} if gone else last
        return self._variation.jump(levels, target, jumps, rng)

    def _is_gone(self, group: Sequence[int], levels: Levels) -> bool:
        return all(levels[i] == len(self._table[i]) - 1 for i in group)

    def _kind(self, group: Sequence[int]) -> list[tuple[str, int]]:
        """Groups of the same kind may exchange their levels."""
        return [(self._slots[i].kind, len(self._table[i])) for i in group]

    def crossover(self, first: Architecture, second: Architecture, rng: np.random.Generator) -> Architecture:
        """As `LevelVariation.mix`, with the repair of either parent."""
        target = self._met_target(first)
        repair = self._repair_of(first if rng.random() < 0.5 else second)
        mixed = self._variation.mix(self._levels_of(first), self._levels_of(second), target, rng)
        return self._architecture(mixed, repair)

    def repair(self, candidate: Architecture, target: int, rng: np.random.Generator) -> Architecture:
        levels = self._levels_of(candidate)
        found = self._variation.repair(levels, target, rng)
        return candidate if found is levels else self._architecture(found, self._repair_of(candidate))

    # --- meaning of a candidate ---

    def _check_blocks(self, candidate: Architecture) -> None:
        if candidate.hidden:
            raise ValueError(f"Expected all hidden channels unless blocks are alike, got {candidate.hidden}.")
        for index, (kept, levels) in enumerate(zip(candidate.blocks, self.levels, strict=True)):
            known = kept.kv_groups in levels.kv_groups and kept.ffn in levels.ffn
            known = known and kept.channels in levels.channels and kept.shared in levels.shared
            if not known or kept.queries not in levels.queries:
                heads = f" with {levels.queries} query heads each (0: all)" if len(levels.queries) > 1 else ""
                raise ValueError(
                    f"Expected one of {levels.kv_groups} KV groups{heads} and of {levels.ffn} channels"
                    f"{_inside(levels)}, got "
                    f"{Architecture((kept,)).text.partition(':')[2]} at block {index}."
                )
            if kept.queries and not kept.kv_groups:
                raise ValueError(
                    f"Expected no query heads without KV groups, got {kept.queries} at block {index}."
                )
        if self.assemble(self.disassemble(candidate)) != candidate:
            raise ValueError(f"Expected an architecture that `units` can make, got {candidate.text[:80]!r}.")

    # --- separable view ---

    def locality_key(self, candidate: Architecture) -> Any:
        """The repair first, since it changes every block."""
        return candidate.repair, self._levels_of(candidate)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots; ``repair`` is the last one if there are several."""
        return (*(slot.name for slot in self._slots), *(("repair",) if len(self.repairs) > 1 else ()))

    def options(self, slot: int) -> Sequence[int]:
        return range(len(self.repairs) if slot == len(self._slots) else len(self._table[slot]))

    def usage(self, slot: int, option: int) -> int:
        return 0 if slot == len(self._slots) else self._table[slot][option]

    def share(self, slot: int, option: int) -> float:
        return 0.0 if slot == len(self._slots) else self._slots[slot].shares[option]

    def block_of(self, slot: int) -> int:
        return len(self._shape.blocks) if slot == len(self._slots) else self._slots[slot].block

    def usage_bounds(self, target: int) -> tuple[int, int]:
        window = self._of_slots.windows[target]
        return window.low, window.high

    def assemble(self, options: Sequence[int]) -> Architecture:
        n = len(self._slots)
        return self._architecture(tuple(options[:n]), options[n] if len(options) > n else 0)

    def disassemble(self, candidate: Architecture) -> tuple[int, ...]:
        repair = (self._repair_of(candidate),) if len(self.repairs) > 1 else ()
        return (*self._levels_of(candidate), *repair)

    # --- helpers ---

    def _architecture(self, levels: Levels, repair: int = 0) -> Architecture:
        blocks = list(self._of_slots.dense)
        for slot, level in zip(self._slots, levels, strict=True):
            blocks[slot.block] = slot.kept(level, blocks[slot.block])
        return Architecture(tuple(blocks), self._repair_name(repair))

    def _levels_of(self, candidate: Architecture) -> Levels:
        return tuple(slot.option_of(candidate.blocks[slot.block]) for slot in self._slots)


def _inside(levels: BlockLevels) -> str:
    """Numbers of channels within experts that a block may keep, in words for errors."""
    routed = f" with {levels.channels} channels each (0: all)" if len(levels.channels) > 1 else ""
    return routed + (f" and {levels.shared} of the shared ones" if len(levels.shared) > 1 else "")


def _groups(slots: Sequence[Slot], *, together: bool) -> tuple[tuple[int, ...], ...]:
    """Groups of slots for depth moves: single removable slots, and the pair of each block if `together`."""
    alone = [i for i, slot in enumerate(slots) if slot.removable]
    blocks: dict[int, list[int]] = {}
    for i in alone:
        blocks.setdefault(slots[i].block, []).append(i)
    pairs = [tuple(group) for group in blocks.values() if together and len(group) > 1]
    return (*((i,) for i in alone), *pairs)
