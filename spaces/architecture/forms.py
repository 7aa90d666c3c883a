"""Forms of architectures with equal blocks, and the forms that meet each target."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from secateur.spaces.architecture.candidate import GONE, Kept
from secateur.spaces.architecture.cost import CostName, check_latency, dense_of, usage_of
from secateur.spaces.architecture.levels import BlockLevels, LevelRules
from secateur.spaces.levels import Window, check_ascending, nearest_window, rounded_share, spread_order
from secateur.spaces.shape import ModelShape


class Form(NamedTuple):
    """Shape of a tied architecture: number and width of its blocks, without the choice of dropped blocks.

    Args:
        n_blocks: number of kept blocks.
        kept: units of each of them.
        hidden: hidden channels; 0: all.
    """

    n_blocks: int
    kept: Kept
    hidden: int = 0


LATENCY_TOLERANCE = 0.03
"""Share of the dense latency by which equal blocks may miss a target; two measurements of a table differ by as much."""


class FormTargets:
    """Cost removed by each form, in the target's unit.

    Blocks of one kind have equal numbers of units. Of a model with MLPs and mixtures a form gives the numbers of the
    more frequent ones; the others keep the nearest share. What mixes tokens without units is kept in kept blocks.

    Args:
        shape: of the dense model: KV groups of all attentions that can be cut, channels of all MLPs, and experts of all
            mixtures are equal in number.
        rules: for the levels. The first block and protected ones are never dropped, nor the first one of each kind.
        targets: shares of the blocks' `of` to remove, ascending; each is met to within half of the smallest step from
            the dense model, a latency to within that of the nearest form if this is within `LATENCY_TOLERANCE`.
        of: quantity of the target.

    Raises:
        ValueError: if the blocks differ, the rules don't fit them, a target can't be met, or a latency is not known.
    """

    def __init__(self, shape: ModelShape, rules: LevelRules, targets: Sequence[float], of: CostName) -> None:
        check_ascending("target", targets)
        check_latency(shape, of)
        levels = rules.levels(shape)
        self._shape, self._of = shape, of
        self.targets = tuple(targets)
        self._with_groups, self._with_ffn = _first_ones(shape)
        own = [
            replace(rules, protect=frozenset()).levels(replace(shape, blocks=(block,)))[0]
            for block in shape.blocks
        ]
        firsts = (self._with_groups, self._with_ffn, *(i for i, x in enumerate(own) if x not in own[:i]))
        removable = (index for index, block in enumerate(levels) if block.is_droppable)
        self.droppable = [index for index in removable if index not in firsts]
        groups, ffn = own[self._with_groups], own[self._with_ffn]
        self._widths = [x.ffn for x in own]
        self.alike = replace(groups, ffn=ffn.ffn, channels=ffn.channels, shared=ffn.shared)
        self.dense = Form(len(shape.blocks), Kept(self.alike.kv_groups[0], self.alike.ffn[0]))
        self.hidden = (0, *(x.width for x in shape.narrower)) if "hidden" in rules.units else (0,)
        self._n_total = self._usage(self.blocks(self.dense, ()))
        self.windows = self._find_windows()

    def _usage(self, blocks: Sequence[Kept], hidden: int = 0) -> int:
        usage, shape = usage_of(self._of), self._shape.at(hidden)
        return sum(usage(shape, block, kept) for block, kept in zip(shape.blocks, blocks, strict=True))

    @cached_property
    def _removed(self) -> dict[Form, float]:
        """Cost removed by each form; a dropped block counts as the mean of the droppable ones."""
        found = {}
        for kept, hidden in ((kept, hidden) for hidden in self.hidden for kept in self.shapes):
            if not self.is_held(kept, hidden):
                continue
            shape, usage = self._shape.at(hidden), usage_of(self._of)
            usages = [usage(shape, x, self._in_block(i, kept)) for i, x in enumerate(shape.blocks)]
            mean = sum(usages[i] for i in self.droppable) / (len(self.droppable) or 1)
            for n in range(len(self.droppable) + 1):
                found[Form(len(usages) - n, kept, hidden)] = self._n_total - sum(usages) + n * mean
        return found

    def is_held(self, kept: Kept, hidden: int) -> bool:
        """True if the form in which models are saved holds these heads at this hidden width."""
        held = next((x.held for x in self._shape.narrower if x.width == hidden), None)
        rigid = self._shape.blocks[self._with_groups].rigid
        return held is None or rigid or (kept.kv_groups, kept.queries) in held

    def _find_windows(self) -> tuple[Window, ...]:
        removed, total = self._removed.values(), self._n_total
        step = math.ceil(self._smallest_step())
        windows = tuple(self._window(t, step) for t in self.targets)
        for target, window in zip(self.targets, windows, strict=True):
            if (target and window.low <= 0) or not any(window.low <= x <= window.high for x in removed):
                near = min((x / total for x in removed if x), key=lambda x: abs(x - target), default=0.0)
                raise ValueError(
                    f"Expected `target` from {(step // 2 + 1) / total:.2g} to {max(removed) / total:.4g} (what equal "
                    f"blocks can lose of their {self._of}), got {target:g}. The nearest is {near:.4g}; or add "
                    f"`units`, use a smaller `ffn_step`, or protect fewer blocks."
                )
        for low, high in pairwise(windows):
            if high.low <= low.high:
                raise ValueError(
                    f"Expected targets that the levels tell apart ({step / total:.2g}), got {list(self.targets)}. "
                    f"Use fewer targets, or a smaller `ffn_step`."
                )
        return windows

    def _window(self, target: float, step: int) -> Window:
        """Costs to remove; of a latency, which is measured, about the nearest form if none meets the target."""
        wanted = rounded_share(target, self._n_total)
        window = nearest_window(wanted, step)
        if not target or not self._of.startswith("latency"):
            return window
        off = min((x - wanted for x in self._removed.values() if x > 0), key=abs, default=0.0)
        if abs(off) > LATENCY_TOLERANCE * self._n_total or window.low <= wanted + off <= window.high:
            return window
        return nearest_window(round(wanted + off), step)

    def _smallest_step(self) -> float:
        """Smallest mean step: one level of all blocks' groups or channels, or one dense block."""
        (n_blocks, kept, _), (groups, ffn) = self.dense, (self.alike.kv_groups, self.alike.ffn)
        queries = self.alike.queries
        steps = [
            self._removed[Form(n_blocks, kept._replace(kv_groups=groups[-1]))] / max(len(groups) - 1, 1),
            self._removed[Form(n_blocks, kept._replace(ffn=ffn[-1]))] / max(len(ffn) - 1, 1),
            self._removed.get(Form(n_blocks - 1, kept), 0.0),
            self._removed.get(Form(n_blocks, kept._replace(queries=queries[-1])), 0.0)
            / max(len(queries) - 1, 1),
            self._removed.get(Form(n_blocks, kept, self.hidden[-1]), 0.0) / max(len(self.hidden) - 1, 1),
        ]
        return min((step for step in steps if step), default=1.0)

    @cached_property
    def forms(self) -> tuple[list[Form], ...]:
        return tuple(
            [form for form, removed in self._removed.items() if window.low <= removed <= window.high]
            for window in self.windows
        )

    def uniform(self, target: int) -> tuple[Form, list[int]]:
        """Form and dropped blocks of a target's uniform candidate.

        The fewest dropped blocks, spread over the depth, and shares of groups and channels as equal as possible.

        Raises:
            ValueError: if blocks have different costs and no form meets the target.
        """
        found = self.find(target, [self.droppable[i] for i in spread_order(len(self.droppable))])
        if found is None:
            raise ValueError(
                f"Expected a `target` that blocks of different {self._of} can meet, got {self.targets[target]:g}. Use "
                f"another one, or `of: params`."
            )
        return found

    def find(
        self, target: int, order: Sequence[int], *, shallow: bool = False
    ) -> tuple[Form, list[int]] | None:
        """A form that meets the target, with its dropped blocks; None if there is none.

        All hidden channels stay if that is possible; shares of groups and channels are as equal as possible.

        Args:
            order: droppable blocks, the first ones are dropped first.
            shallow: drop the most blocks instead of the fewest.
        """

        def rank(form: Form) -> tuple[int, bool, float]:
            heads, ffn = self._shares(form.kept)
            n_blocks = form.n_blocks if shallow else -form.n_blocks
            return n_blocks, form.hidden > 0, abs(heads - ffn)

        for form in sorted(self.forms[target], key=rank):
            dropped = list(order[: self.dense.n_blocks - form.n_blocks])
            if self.target_of(self.blocks(form, dropped), form.hidden) == target:
                return form, dropped
        return None

    def target_of(self, blocks: Sequence[Kept], hidden: int = 0) -> int | None:
        """Index of the target that the architecture meets, or None."""
        removed = self._n_total - self._usage(blocks, hidden)
        return next((i for i, window in enumerate(self.windows) if removed in window), None)

    def blocks(self, form: Form, dropped: Collection[int]) -> tuple[Kept, ...]:
        every = range(self.dense.n_blocks)
        return tuple(GONE if index in dropped else self._in_block(index, form.kept) for index in every)

    def form_of(self, blocks: Sequence[Kept], hidden: int) -> tuple[Form, list[int]]:
        """Form of these blocks, and the dropped ones."""
        dropped = [index for index, kept in enumerate(blocks) if kept == GONE]
        kept = blocks[self._with_groups]._replace(ffn=blocks[self._with_ffn].ffn)
        return Form(len(blocks) - len(dropped), kept, hidden), dropped

    def _in_block(self, index: int, kept: Kept) -> Kept:
        """Units that a kept block has in a form with these numbers."""
        block, widths = self._shape.blocks[index], self._widths[index]
        if block.rigid and index != self._with_groups:
            kept = kept._replace(kv_groups=block.n_kv_groups, queries=0)
        if widths is not self._widths[self._with_ffn] and widths != self.alike.ffn:
            share = kept.ffn / self.alike.ffn[0]
            kept = kept._replace(ffn=min(widths, key=lambda n: abs(n / max(widths[0], 1) - share)))
        return kept

    @property
    def levels(self) -> tuple[BlockLevels, ...]:
        zeros = [(0,) if index in self.droppable else () for index in range(self.dense.n_blocks)]
        groups, queries = self.alike.kv_groups, self.alike.queries
        return tuple(
            BlockLevels(_distinct(block.n_kv_groups, *zero), _distinct(*ffn, *zero))
            if block.rigid
            else BlockLevels(_distinct(*groups, *zero), _distinct(*ffn, *zero), queries)
            for block, ffn, zero in zip(self._shape.blocks, self._widths, zeros, strict=True)
        )

    @cached_property
    def shapes(self) -> tuple[Kept, ...]:
        """Shapes that all kept blocks may have."""
        found = (
            Kept(groups, width, queries)
            for groups in self.alike.kv_groups
            for queries in self.alike.queries
            for width in self.alike.ffn
        )
        held = self._shape.held_queries
        return tuple(x for x in found if not x.queries or held is None or (x.kv_groups, x.queries) in held)

    def _shares(self, kept: Kept) -> tuple[float, float]:
        """Shares of query heads and of channels that are kept."""
        n_queries, dense = self._shape.blocks[self._with_groups].n_queries, self.dense.kept
        heads = kept.kv_groups * (kept.queries or n_queries) / (dense.kv_groups * n_queries)
        return heads, kept.ffn / (dense.ffn or 1)  # Mamba has no MLPs

    def distance(self, first: Form, second: Form) -> float:
        """Sum of the differences in the shares of blocks, groups, channels and query heads of a group."""
        n_queries = self._shape.blocks[self._with_groups].n_queries
        of_first, of_second, dense = (
            (form.n_blocks, *form.kept.units, form.kept.queries or n_queries)
            for form in (first, second, self.dense)
        )
        near = sum(abs(a - b) / (whole or 1) for a, b, whole in zip(of_first, of_second, dense, strict=True))
        one, other = (self.hidden.index(form.hidden) for form in (first, second))
        return near + abs(one - other) / len(self.hidden)


def _first_ones(shape: ModelShape) -> tuple[int, int]:
    """The first block whose KV groups can be cut, and the first of those with MLPs or mixtures, whichever are more.

    Raises:
        ValueError: if blocks of one kind have different numbers of units.
    """
    heads = [index for index, block in enumerate(shape.blocks) if not block.rigid]
    mixed = [index for index, block in enumerate(shape.blocks) if block.experts is not None]
    plain = [index for index, block in enumerate(shape.blocks) if block.experts is None and block.ffn_width]
    for same, of in ((heads, 0), (mixed, 1), (plain, 1)):
        for index in same:
            first, other = (dense_of(shape.blocks[x]) for x in (same[0], index))
            if first.units[of] != other.units[of]:
                raise ValueError(
                    f"Expected equal blocks for a tied architecture, got {other} at block {index} and {first} at block "
                    f"{same[0]}. Use `tied: false`."
                )
    return (heads or [0])[0], ((mixed if len(mixed) > len(plain) else plain) or [0])[0]


def _distinct(*levels: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(levels))
