"""Checks that a block without a sub-layer is one in which the sub-layer gives zeros."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from secateur.pruners.models.anatomy import Block
from secateur.pruners.models.cutting import no_output, set_bias
from secateur.pruners.models.find_sublayer import OVER_TOKENS, owner_of
from secateur.pruners.models.layout import BlockLayout, MixtureLayout, SublayerLayout
from secateur.pruners.models.live_experts import live_part
from secateur.pruners.models.runner import BlockInputs, BlockRunner


def vanishes(runner: BlockRunner, layout: BlockLayout, inputs: BlockInputs) -> bool:
    """True if a block without its sub-layers does nothing: none of its norms is over the residual stream itself."""
    live = [live_part(part) for part in layout.parts]
    try:
        for one in live:
            one.remove()
        found = runner.block(layout.block.index, inputs.hidden, inputs)
        return torch.equal(found, inputs.hidden.to(found.device))
    finally:
        for one in live:
            one.restore()


def own_norms(runner: BlockRunner, layout: BlockLayout, inputs: BlockInputs) -> tuple[bool, ...]:
    """One flag a sub-layer: True if its norms are removed with it; False where they norm the residual stream (MiniMax).

    Raises:
        ValueError: if the block without the sub-layer is not one in which the sub-layer gives zeros, either way.
    """
    found = []
    for part in layout.parts:
        ways = [part] if not part.norms else [part, replace(part, norms=())]
        works = [_is_zero(runner, layout.block, way, inputs) for way in ways]
        if not any(works):
            raise ValueError(
                f"Expected {part.name} to give what is added to the residual stream, got a module that does more. This "
                f"family ({runner.anatomy.family}) can't be cut."
            )
        found.append(works[0])
    return tuple(found)


def _is_zero(
    runner: BlockRunner, block: Block, part: SublayerLayout | MixtureLayout, inputs: BlockInputs
) -> bool:
    """True if a block without this sub-layer's module is one in which it gives zeros."""
    kinds = OVER_TOKENS if part.kind == "attention" else ("mlp", "experts")
    held = [(x, x.weight, x.bias) for x in block.linears if x.is_output and x.sublayer in kinds]
    names = {f"{block.name}.{name}": module for name, module in block.module.named_modules() if name}
    is_mlp = isinstance(part, SublayerLayout) and part.kind == "mlp"
    mlp = owner_of(block, names, [x for x, _, _ in held]) if is_mlp else None
    live = live_part(part)
    try:
        for output, weight, bias in held:
            output.point_to(torch.zeros_like(weight))
            set_bias(output.module, None if bias is None else torch.zeros_like(bias))
        zeroed = runner.block(block.index, inputs.hidden, inputs)
        for output, weight, bias in held:
            output.point_to(weight)
            set_bias(output.module, bias)
        live.remove()
        with (
            no_output(mlp, part.returns)
            if mlp is not None and isinstance(part, SublayerLayout)
            else nullcontext()
        ):
            removed = runner.block(block.index, inputs.hidden, inputs)
    finally:
        live.restore()
    tolerance = 64 * torch.finfo(zeroed.dtype).eps * float(zeroed.nan_to_num().abs().max())
    finite = bool(torch.isfinite(zeroed).all())
    return not finite or torch.allclose(removed, zeroed, rtol=0.0, atol=tolerance)
