"""Whole sub-layers, one after the other: the one goes without which the model is least changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.backward import CHUNK_TOKENS
from secateur.pruners.calibration.stream import mean_loss
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.models.live_experts import live_part
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.recipes.allocation.filling import check_reach, in_order, wanted_weights
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence
from secateur.pruners.recipes.context import Sample

Distance = Callable[[Float[Tensor, "windows length width"]], float]
"""Distance between a model and the dense one, from the model's last hidden states; lower is better."""


def in_turn(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float) -> Ints:
    """Whole sub-layers in the order that was measured, as many as the budget allows; the next one in part.

    BlockPruner (Zhong et al. 2025, arXiv 2406.10594) and FinerCut (Zhang et al. 2024, arXiv 2405.18218), by what is
    measured. In part, because whole sub-layers would miss the budget; of that one the units that score least go. The
    first attention keeps a group. A mixture of experts, which the papers have none of, is one sub-layer.

    Args:
        evidence: with the place of each sub-layer, from `by_loss` or `by_divergence`; infinite: not reached.
    """
    wanted = wanted_weights(layers, sparsity)
    reached = [math.isfinite(place) for place in evidence.measured]
    times = [
        place + np.arange(layer.n_free if is_reached else 0) / layer.n_units
        for layer, place, is_reached in zip(layers, evidence.measured, reached, strict=True)
    ]
    check_reach([layer for layer, x in zip(layers, reached, strict=True) if x], wanted, layers)
    return in_order(layers, times, wanted)


def by_loss(anatomy: Anatomy, sample: Sample, *, sparsity: float) -> tuple[float, ...]:
    """BlockPruner's order: the loss without the sub-layer and those before it is lowest.

    Its perplexity is the exponential of the mean over sequences, which are of one length here. There 256 samples of
    Alpaca calibrate.
    """
    return _places(anatomy, sample, sparsity, lambda hidden: mean_loss(anatomy, hidden, sample.tokens))


def by_divergence(anatomy: Anatomy, sample: Sample, *, sparsity: float) -> tuple[float, ...]:
    """FinerCut's order: the Jensen-Shannon divergence of the outputs from the dense model's is lowest.

    A mean over tokens. There 10 sequences of 256 tokens of WikiText-2 calibrate.
    """
    runner = BlockRunner(anatomy)
    dense = runner.run(runner.start(sample.tokens)).flatten(0, 1).split(CHUNK_TOKENS)

    def distance(hidden: Float[Tensor, "windows length width"]) -> float:
        total = 0.0
        for chunk, expected in zip(hidden.flatten(0, 1).split(CHUNK_TOKENS), dense, strict=True):
            one, other = (anatomy.logits(anatomy.tail(x)).float().softmax(-1) for x in (chunk, expected))
            middle = (one + other) / 2
            for side in (one, other):
                total += float((torch.xlogy(side, side) - torch.xlogy(side, middle)).sum()) / 2
        return total / hidden[..., 0].numel()

    return _places(anatomy, sample, sparsity, distance)


@torch.no_grad()
def _places(anatomy: Anatomy, sample: Sample, sparsity: float, distance: Distance) -> tuple[float, ...]:
    """Place of each sub-layer in the order of removal, as far as the sparsity needs; the live model is left dense."""
    units = _Units(find_layouts(anatomy, experts=True))
    live = [live_part(part) for part in units.parts]
    places, removed, wanted = [math.inf] * len(live), 0, sparsity * sum(units.sizes)
    runner = BlockRunner(anatomy)
    inputs = runner.start(sample.tokens)
    try:
        for place in range(len(live)):
            if removed >= wanted:
                break
            hidden, found = inputs.hidden, dict[int, float]()
            for block in anatomy.blocks:
                for index in units.of(block.index):
                    if math.isinf(places[index]) and units.may_go(index, wanted - removed):
                        live[index].remove()
                        above = hidden
                        for later in anatomy.blocks[block.index :]:
                            above = runner.block(later.index, above, inputs)
                        found[index] = distance(above)
                        live[index].restore()
                hidden = runner.block(block.index, hidden, inputs)
            if not found:
                break
            best = min(found, key=found.__getitem__)
            live[best].remove()
            places[best], removed = float(place), removed + units.sizes[best]
    finally:
        for one in live:
            one.restore()
    return tuple(places)


class _Units:
    """Sub-layers of all blocks, with their sizes in parameters."""

    def __init__(self, layouts: Sequence[BlockLayout]) -> None:
        self.parts = [part for layout in layouts for part in layout.parts]
        self.sizes = [part.n_units * part.unit_params + part.fixed_params for part in self.parts]
        self._blocks = [layout.block.index for layout in layouts for _ in layout.parts]

    def of(self, block: int) -> Iterator[int]:
        """Places of a block's sub-layers."""
        return (index for index, of in enumerate(self._blocks) if of == block)

    def may_go(self, index: int, left: float) -> bool:
        """True if a sub-layer may go next: in part, or as a whole that exceeds the rest by half of it at most.

        What mixes tokens in the first block stays if it can't go in part.
        """
        part = self.parts[index]
        in_part = isinstance(part, SublayerLayout) and not part.rigid and not part.parallel
        first = self._blocks[index] == 0 and part.kind == "attention"
        return in_part or (not first and self.sizes[index] <= 2 * left)
