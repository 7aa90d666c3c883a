"""Rounds of a recipe's schedule: the live model as the rounds before left it, and shares of what is left."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruners.models.anatomy import Linear
from secateur.pruners.models.cutting import pass_through, set_bias
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.recipes.allocation.layers import Layer
from secateur.pruners.structure.kprune import KeptNumbers


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
    output.point_to(output.weight * columns_of(part, kept))
    if bias is not None and not kept:
        set_bias(output.module, torch.zeros_like(bias))


def columns_of(part: SublayerLayout, kept: Sequence[int]) -> Bool[Tensor, " inputs"]:
    """True at the columns of the output projection that these units have."""
    stays = torch.zeros(part.n_units, dtype=torch.bool)
    stays[list(kept)] = True
    return stays.repeat_interleave(part.unit_width).to(part.output.weight.device)


@contextmanager
def using(linears: Iterable[Linear], weights: Mapping[str, Float[Tensor, "out in"]]) -> Iterator[None]:
    """Context in which projections of the live model have other weights, of the dense shapes, by full name."""
    before = [(linear, linear.weight) for linear in linears if linear.name in weights]
    try:
        for linear, _ in before:
            linear.point_to(weights[linear.name])
        yield
    finally:
        for linear, weight in before:
            linear.point_to(weight)


def of_the_rest(share: float, dense: Sequence[Layer], layers: Sequence[Layer]) -> float:
    """Share of what is left that is to go, so that this share of all will have gone.

    Args:
        dense: all layers, whole.
        layers: what is left of them.
    """
    whole, rest = (sum(layer.n_weights for layer in some) for some in (dense, layers))
    return share if whole == rest else max(0.0, (share * whole - (whole - rest)) / rest)
