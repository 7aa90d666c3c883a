"""Weights of every option of every slot of a separable space, in the dense model's shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.pruner import Pruner
from secateur.spaces.space import SeparableSpace


@dataclass(frozen=True)
class SlotOptions:
    """Options of one slot.

    Args:
        slot: its index.
        weights: of each option, by the full names of the projections that the slot changes.
    """

    slot: int
    weights: tuple[dict[str, Float[Tensor, "out in"]], ...]

    def changes(self, name: str, reference: Tensor) -> Float[Tensor, "options weights"]:
        """A projection's weights at every option minus the reference, in fp32, a row an option."""
        dense = reference.float()
        return torch.stack([(option[name].float() - dense).flatten() for option in self.weights])


class AllOptions:
    """Options of all slots, block by block.

    Slots that don't count towards the target, such as the repair, have their option in the first target's reference.

    Args:
        pruner: open, of a separable space.
    """

    def __init__(self, pruner: Pruner) -> None:
        space = pruner.space
        assert isinstance(space, SeparableSpace), "checked by the controllers that use options"
        self.pruner = pruner
        self._options = [len(space.options(slot)) for slot in range(len(space.slots))]
        baselines = space.baselines()
        self._free = space.disassemble(list(baselines.values())[1])
        self.dense = space.disassemble(baselines["dense"])
        self._names = [self._changed(slot) for slot in range(len(space.slots))]

    @property
    def watched(self) -> frozenset[str]:
        """Full names of the projections that some slot changes."""
        return frozenset(name for names in self._names for name in names)

    def of(self, block: int) -> Iterator[SlotOptions]:
        """Options of the slots of a block."""
        slots = [s for s, names in enumerate(self._names) if names and self.pruner.space.block_of(s) == block]
        n_options = max((self._options[slot] for slot in slots), default=0)
        at = [
            self._weights(block, [self._option(slot, o) for slot in range(len(self._names))])
            for o in range(n_options)
        ]
        for slot in slots:
            rows = at[: self._options[slot]]
            yield SlotOptions(slot, tuple({name: row[name] for name in self._names[slot]} for row in rows))

    def point(self, block: int, options: Sequence[int]) -> None:
        """Point the block's projections to a candidate's weights in dense shapes."""
        weights = self._weights(block, options)
        for linear in self.pruner.anatomy.blocks[block].linears:
            if linear.name in weights:
                linear.point_to(weights[linear.name])

    def position(self, slot: int, option: int) -> int:
        """Place of an option among those of its slot."""
        options: list[int] = list(self.pruner.space.options(slot))
        return options.index(option)

    def _option(self, slot: int, position: int) -> int:
        """The slot's option at this position or its last one; that of the reference where options don't count."""
        if not self._names[slot]:
            return self._free[slot]
        options: list[int] = list(self.pruner.space.options(slot))
        return options[min(position, len(options) - 1)]

    def _changed(self, slot: int) -> tuple[str, ...]:
        """Projections that the slot's options change."""
        space = self.pruner.space
        last = list(space.options(slot))[-1]
        if not space.usage(slot, last):
            return ()
        block = space.block_of(slot)
        options = list(self.dense)
        before = self._weights(block, options)
        options[slot] = last
        return tuple(
            name for name, weight in self._weights(block, options).items() if weight is not before[name]
        )

    def _weights(self, block: int, options: Sequence[int]) -> dict[str, Tensor]:
        space = self.pruner.space
        key = self.pruner.keys(space.config(space.assemble(options)))[block]
        return dict(self.pruner.weights_of(block, key))
