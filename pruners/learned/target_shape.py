"""Target shape of a pruned model: numbers of blocks, hidden channels, KV groups and FFN channels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from secateur.pruners.export.stock import stock_hidden
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.layout import BlockLayout
from secateur.pruners.models.shape import model_shape, narrow_shape
from secateur.pruners.models.stream_axes import stream_axes
from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import BudgetError, RuleEvidence
from secateur.pruners.structure.knowledge import unit_layers
from secateur.pruners.structure.kprune import check_stream
from secateur.spaces.architecture.candidate import GONE, Kept
from secateur.spaces.architecture.cost import cost

STEP = 8
"""Distance of the hidden widths, where it divides the dense one."""

TRIES = 64
"""Hidden widths that are tried."""

REACH = 0.05
"""Largest distance of a shape's sparsity from the one that is asked for; small models round by much."""


@dataclass(frozen=True)
class TargetShape:
    """Numbers that stay.

    Args:
        units: KV groups, or channels, of each sub-layer by its name.
        n_blocks: blocks, the first one among them.
        width: hidden channels; 0: all.
    """

    units: dict[str, int]
    n_blocks: int
    width: int = 0


def uniform_shape(layouts: Sequence[BlockLayout], sparsity: float, protected: Collection[str]) -> TargetShape:
    """The shape of the rule uniform, which takes units alone.

    Raises:
        BudgetError: if less may go.
    """
    parts = [part for layout in layouts for part in layout.sublayers]
    layers = unit_layers(parts, protected)
    gone = allocate("uniform", layers, RuleEvidence(), sparsity, "structure")
    return TargetShape(
        {part.name: part.n_units - n for part, n in zip(parts, gone, strict=True)}, len(layouts)
    )


def whole_shape(
    anatomy: Anatomy, layouts: Sequence[BlockLayout], sparsity: float, *, blocks: float, hidden: float
) -> TargetShape:
    """A shape that takes blocks and hidden channels, too, with the same units in all blocks that stay.

    Of the kept share k of the parameters, ``k ** blocks`` of the blocks stay, ``k ** hidden`` of the hidden channels,
    and ``k ** (1 - blocks - hidden)`` of the units, so that the product is k; numbers of channels make up for the
    rounding of the others. The hidden width is one that the stock class holds, with the nearest number of KV groups.

    Raises:
        BudgetError: if no number of channels comes near to the sparsity.
        ValueError: if the model can't lose hidden channels, or has other sums or biases on the way to the stream.
    """
    check_gates(anatomy, layouts, hidden=hidden > 0)
    kept = 1 - sparsity
    n_blocks = max(1, round(len(layouts) * kept**blocks))
    parts = [part for layout in layouts for part in layout.sublayers]
    share = kept ** (1 - blocks - hidden)
    groups = max(round(x.n_units * share) for x in parts if x.kind == "attention") or 1
    width = 0
    if hidden:
        width, groups = _nearest_width(anatomy, anatomy.width * kept**hidden, groups)
    shape = model_shape(anatomy, 1, 1)
    if width:
        shape = replace(shape, narrower=(narrow_shape(anatomy, shape, width),))
    most = max(x.n_units for x in parts if x.kind == "mlp")

    def removed(channels: int) -> float:
        rows = [Kept(groups, channels)] * n_blocks + [GONE] * (len(layouts) - n_blocks)
        return cost(shape, rows, hidden=width)["sparsity"]

    numbers = range(1, most + 1)
    place = bisect_left(numbers, -sparsity, key=lambda n: -removed(n))
    nearest = numbers[max(place - 1, 0) : place + 1]
    channels = min(nearest, key=lambda n: (abs(removed(n) - sparsity), n))
    if abs(removed(channels) - sparsity) > REACH:
        raise BudgetError(
            f"Expected a sparsity within [{removed(most):.3f}, {removed(1):.3f}] for {n_blocks} blocks, "
            f"{width or anatomy.width} hidden channels and {groups} KV groups, got {sparsity:g}. Choose another, or "
            "other `blocks` and `hidden`."
        )
    return TargetShape(
        {x.name: groups if x.kind == "attention" else channels for x in parts}, n_blocks, width
    )


def _nearest_width(anatomy: Anatomy, wanted: float, groups: int) -> tuple[int, int]:
    """Hidden width that a stock class holds, and the number of KV groups beside it."""
    step = STEP if anatomy.width % STEP == 0 else 1
    widths = sorted(range(step, anatomy.width, step), key=lambda width: (abs(width - wanted), width))
    for width in widths[:TRIES]:
        held = [n for n, _ in stock_hidden(anatomy, width, groups=True, queries=False)]
        if held:
            return width, min(held, key=lambda n: (abs(n - groups), n))
    raise ValueError(
        f"Expected a stock class that holds about {wanted:.0f} hidden channels, got {anatomy.family}, in which the "
        "width of heads follows theirs. Say `hidden: 0`."
    )


def hidden_width(anatomy: Anatomy, sparsity: float) -> int:
    """The hidden width that a stock class holds whose blocks, with all units, come nearest to this sparsity.

    Raises:
        BudgetError: if none comes near to it.
        ValueError: if the model can't lose hidden channels.
    """
    shape, whole = model_shape(anatomy, 1, 1), [block.whole for block in anatomy.blocks]

    def removed(width: int) -> float:
        narrow = replace(shape, narrower=(narrow_shape(anatomy, shape, width),))
        return cost(narrow, whole, hidden=width)["sparsity"]

    half = anatomy.width // 2
    per_channel = removed(half) / (anatomy.width - half)  # parameters are linear in the width
    wanted = anatomy.width - sparsity / per_channel
    widths = sorted(range(1, anatomy.width), key=lambda width: (abs(width - wanted), width))
    loadable = (x for x in widths[:TRIES] if stock_hidden(anatomy, x, groups=False, queries=False))
    width = next(loadable, 0)
    if not width or abs(removed(width) - sparsity) > REACH:
        raise BudgetError(
            f"Expected a sparsity that a stock class holds with about {wanted:.0f} hidden channels and all units, got "
            f"{sparsity:g}. Choose another."
        )
    return width


def check_gates(anatomy: Anatomy, layouts: Sequence[BlockLayout], *, hidden: bool) -> None:
    """Raise a ValueError unless blocks are alike, and outputs of projections go to the stream as they are."""
    outputs = [part.output for layout in layouts for part in layout.sublayers]
    numbers = {tuple((part.kind, part.n_units) for part in layout.sublayers) for layout in layouts}
    what = "gates of blocks and hidden channels"
    if len(numbers) > 1:
        raise ValueError(f"Expected blocks with the same units for {what}, got others. Leave both at 0.")
    biased = next((x.name for x in outputs if x.bias is not None), None)
    if biased is not None:
        raise ValueError(
            f"Expected output projections without a bias for {what}, got one at {biased}. Leave both at 0."
        )
    if hidden:
        stream_axes(anatomy)
    try:
        check_stream(anatomy, layouts)
    except ValueError:
        raise ValueError(
            f"Expected a family that adds the outputs of its projections to the stream as they are for {what}, got "
            f"{anatomy.family}. Leave both at 0."
        ) from None
