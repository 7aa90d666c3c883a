"""Rounds of a recipe's schedule: shares to reach, and the model without what the rounds before removed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from secateur.pruners.models.cutting import pass_through, set_bias
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.structure.kprune import KeptNumbers


def shares_of(config: Mapping[str, Any]) -> list[float]:
    """Share that is removed after each round, ascending, the recipe's sparsity last; it alone without a schedule."""
    step, sparsity = config.get("schedule", {}).get("step", 1.0), config["sparsity"]
    whole = [step * number for number in range(1, int(sparsity / step) + 1)]
    return [*(share for share in whole if share < sparsity * (1 - 1e-9)), sparsity]


def whole_numbers(layouts: Sequence[BlockLayout]) -> tuple[KeptNumbers, ...]:
    """All units of each block."""
    return tuple({part.kind: tuple(range(part.n_units)) for part in layout.sublayers} for layout in layouts)


@contextmanager
def silenced(
    layouts: Sequence[BlockLayout], numbers: Sequence[KeptNumbers], gone: Collection[int] = ()
) -> Iterator[None]:
    """Context in which the live model is as if only these units were there, and none of the blocks `gone`.

    The columns of output projections of the others are zero, and the biases of those without any. Shapes stay those
    of the dense model, so that whatever measures it can measure again. It takes memory for the output projections of
    the changed blocks.
    """
    before = []
    passing = [pass_through(x.block.module) for x in layouts if x.block.index in gone and not x.vanishes]
    try:
        for layout, kept in zip(layouts, numbers, strict=True):
            if layout.block.index in gone:
                outputs = [linear for linear in layout.block.linears if linear.is_output]
                before += [(output, output.weight, output.bias) for output in outputs]
                for output in outputs:
                    output.point_to(torch.zeros_like(output.weight))
                    set_bias(output.module, None if output.bias is None else torch.zeros_like(output.bias))
                continue
            for part in layout.sublayers:
                if len(kept[part.kind]) < part.n_units:
                    before.append((part.output, part.output.weight, part.output.bias))
                    _silence(part, kept[part.kind])
        yield
    finally:
        for handle in passing:
            handle.remove()
        for output, weight, bias in before:
            output.point_to(weight)
            set_bias(output.module, bias)


def _silence(part: SublayerLayout, kept: Sequence[int]) -> None:
    output, bias = part.output, part.output.bias
    stays = torch.zeros(part.n_units, dtype=torch.bool)
    stays[list(kept)] = True
    columns = stays.repeat_interleave(part.unit_width).to(output.weight.device)
    output.point_to(output.weight * columns)
    if bias is not None and not kept:
        set_bias(output.module, torch.zeros_like(bias))
