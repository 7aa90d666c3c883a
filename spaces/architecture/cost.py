"""Exact costs of architectures, and the quantities of their targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.latency import measuring_command, phase_of
from secateur.spaces.methods import UNIT_REPAIRS
from secateur.spaces.shape import BlockShape, ModelShape

CostName = str
"""Quantity of a target: a key of `USAGES`, or a latency at a further batch size, ``latency_decode@8``."""

ShareOf = Literal["blocks", "model"]
Usage = Callable[[ModelShape, BlockShape, Kept], int]


def _latency(phase: str) -> Usage:
    def usage(shape: ModelShape, block: BlockShape, kept: Kept) -> int:
        assert shape.latency is not None  # checked when the space is made
        times = shape.latency.phases[phase]
        return round(times.attention(kept.kv_groups) * 1e6) + round(times.mlp(kept.ffn) * 1e6)

    return usage


# Cost of one block in integers: parameters, multiply-accumulates, bytes, nanoseconds.
USAGES: dict[CostName, Usage] = {
    "params": lambda shape, block, kept: block.params(*kept),
    "macs": lambda shape, block, kept: block.macs(*kept),
    "kv_bytes": lambda shape, block, kept: block.kv_bytes(kept.kv_groups),
    "latency_prefill": _latency("prefill"),
    "latency_decode": _latency("decode"),
}


def usage_of(of: CostName) -> Usage:
    """Cost of one block in integers, see `USAGES`."""
    return USAGES.get(of) or _latency(of.removeprefix("latency_"))


def is_cost(name: str) -> bool:
    """True for a quantity that targets can be shares of."""
    return name in USAGES or phase_of(name) is not None


def dense_of(block: BlockShape) -> Kept:
    """Kept units of the dense block."""
    return Kept(block.n_kv_groups, block.ffn_width)


def check_latency(shape: ModelShape, of: CostName) -> None:
    """Check that the quantity of the target can be computed.

    Raises:
        ValueError: if it is a latency without a table, or the table is of another model.
    """
    if of.startswith("latency") and shape.latency is None:
        raise ValueError(
            f"Expected a measured latency table of this model on this device for `of: {of}`, got none. Measure one: "
            f"{measuring_command(of)}."
        )
    if shape.latency is None:
        return
    phase = of.removeprefix("latency_")
    if phase != of and phase not in shape.latency.phases:
        raise ValueError(
            f"Expected a latency table at that batch size for `of: {of}`, got one of "
            f"{', '.join(shape.latency.phases)}. Name it in `evaluator.latency.batch`, and measure it: "
            f"{measuring_command(of)}."
        )
    for index, block in enumerate(shape.blocks):
        for times in shape.latency.phases.values():
            known = Kept(len(times.attention_ms) - 1, times.ffn[-1][0])
            if known != dense_of(block):
                raise ValueError(
                    f"Expected a latency table for {block.n_kv_groups} KV groups and {block.ffn_width} channels, got "
                    f"one for {known.kv_groups} and {known.ffn} at block {index}. Measure another: secateur latency "
                    f"MODEL."
                )


def whole_cost(shape: ModelShape, of: CostName) -> float:
    """Cost of the whole dense model, in the unit of `USAGES`."""
    if shape.latency is not None and of.startswith("latency"):
        inside = sum(usage_of(of)(shape, block, dense_of(block)) for block in shape.blocks)
        return inside + shape.latency.phases[of.removeprefix("latency_")].rest_ms * 1e6
    whole = {"params": shape.n_params, "macs": shape.macs_per_token, "kv_bytes": shape.kv_bytes_per_token}
    return float(whole[of])


def held_by_blocks(shape: ModelShape, of: CostName = "params") -> float:
    """Share of the whole model's cost that its blocks hold."""
    usage = usage_of(of)
    return sum(usage(shape, block, dense_of(block)) for block in shape.blocks) / whole_cost(shape, of)


def block_shares(
    shape: ModelShape, targets: Sequence[float], share_of: ShareOf, of: CostName = "params"
) -> tuple[float, ...]:
    """Shares of the blocks' cost to remove, for shares of the blocks or of the whole model.

    Those of the model are rounded up to a hundredth of a percent of the blocks.

    Raises:
        ValueError: if the blocks do not hold as much of the model, or the latency is not known.
    """
    if share_of == "blocks":
        return tuple(targets)
    check_latency(shape, of)
    held = held_by_blocks(shape, of)
    for target in targets:
        if target > held:
            raise ValueError(
                f"Expected `target` of at most {held:.2%} of the model, which is what the blocks hold of its {of}, got "
                f"{target:.2%}. Remove less."
            )
    return tuple(min(1.0, math.ceil(round(target / held * 1e4, 6)) / 1e4) for target in targets)


def cost(
    shape: ModelShape, blocks: Sequence[Kept], repair: str = "none", hidden: int = 0
) -> dict[str, float]:
    """Costs of the whole model; ``sparsity`` is the removed share of the blocks' parameters.

    With fewer hidden channels the embedding and the head are smaller, too, which counts in all but the sparsity.

    Biases added by a repair count in ``params`` and ``size_bytes``, not in the sparsity, so that targets do not depend
    on the repair. (A stock class may store further zero biases, see `pruners.export`.) Latencies, in milliseconds, are
    predicted from the table, if there is one.
    """
    n_dense = sum(block.params(*dense_of(block)) for block in shape.blocks)
    shape = shape.at(hidden)
    pairs = [(block, dense_of(block), kept) for block, kept in zip(shape.blocks, blocks, strict=True)]
    n_narrow = sum(block.params(*dense) for block, dense, _ in pairs)
    params, macs, kv_bytes = (
        sum(USAGES[of](shape, block, dense) - USAGES[of](shape, block, kept) for block, dense, kept in pairs)
        for of in ("params", "macs", "kv_bytes")
    )
    added = (
        sum(block.bias_params(*kept) for block, _, kept in pairs)
        if UNIT_REPAIRS[repair].gives in ("bias", "both")
        else 0
    )
    left = shape.n_params - params + added
    costs = {
        "sparsity": (n_dense - n_narrow + params) / n_dense,
        "params": left,
        "size_bytes": left * shape.bytes_per_param,
        "macs": shape.macs_per_token - macs,
        "kv_bytes": shape.kv_bytes_per_token - kv_bytes,
    }
    if shape.latency is not None:
        for name, times in shape.latency.phases.items():
            inside = sum(times.attention(kept.kv_groups) + times.mlp(kept.ffn) for kept in blocks)
            costs[f"latency_{name}"] = times.rest_ms + inside
    return costs
