"""Foretold effects of switching single slots of a candidate: first and second order in the change of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.pruners.calibration.backward import Top, backward_blocks
from secateur.pruners.calibration.fisher import plus
from secateur.pruners.curvature import Curvature
from secateur.pruners.models.anatomy import Linear
from secateur.pruners.models.runner import BlockInputs
from secateur.pruners.options import AllOptions, SlotOptions
from secateur.pruners.pruner import Pruner
from secateur.spaces.measurement import Table


class Foretelling:
    """Effects of switching single slots of a candidate, foretold from the gradient there and the curvature.

    Args:
        pruner: open, of a separable space.
        curvature: of its slots.
    """

    def __init__(self, pruner: Pruner, curvature: Curvature) -> None:
        self._pruner = pruner
        self._curvature = curvature
        self._options = AllOptions(pruner)

    @property
    def dense(self) -> tuple[int, ...]:
        """Options of the dense model."""
        return self._options.dense

    def second(self, options: Sequence[int]) -> Table:
        """Second-order effect of each option of each slot, in nats a token, >= 0; zeros where no weight changes."""
        space, found = self._pruner.space, []
        for slot, option in enumerate(options):
            if slot in self._curvature.forms:
                row = self._curvature.around(slot, self._options.position(slot, option)).tolist()
            else:
                row = [0.0] * len(space.options(slot))
            found.append(tuple(row))
        return tuple(found)

    def first(
        self,
        options: Sequence[int],
        batches: Sequence[BlockInputs],
        top: Top,
    ) -> Table:
        """First-order effect of each option of each slot; the model is dense before and after.

        Args:
            options: of the candidate, one a slot.
            batches: inputs of the stack.
            top: of the loss, see `backward_blocks`; its gradients are of the mean over all tokens.
        """
        space = self._pruner.space
        gradients: dict[str, Tensor] = {}
        found: list[tuple[float, ...]] = [
            (0.0,) * len(space.options(slot)) for slot in range(len(space.slots))
        ]

        def add(linear: Linear, inputs: Tensor, of_outputs: Tensor) -> None:
            gradients[linear.name] = plus(gradients.get(linear.name), of_outputs.float().T @ inputs.float())

        dense = [(linear, linear.weight) for linear in self._pruner.anatomy.linears]
        try:
            walk = backward_blocks(
                self._pruner.anatomy,
                batches,
                top,
                add,
                watched=self._options.watched,
                before=lambda block: self._options.point(block, options),
            )
            for block in walk:
                for each in self._options.of(block.index):
                    at = self._options.position(each.slot, options[each.slot])
                    found[each.slot] = _slopes(each, at, gradients)
        finally:
            for linear, weight in dense:
                linear.point_to(weight)
        return tuple(found)


def _slopes(each: SlotOptions, at: int, gradients: dict[str, Tensor]) -> tuple[float, ...]:
    """Products of the gradients with the change of weights from the option at this position to each option."""
    totals = torch.zeros(len(each.weights), dtype=torch.float64)
    for name in each.weights[at]:
        if (gradient := gradients.pop(name, None)) is not None:
            totals += torch.stack([(gradient * option[name]).sum().double() for option in each.weights]).cpu()
    return tuple((totals - totals[at]).tolist())
