"""Norms of inputs with tokens weighted by the damage that pruning does to what they predict."""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.calibration.statistics import Hook
from secateur.pruners.calibration.stream import Walk
from secateur.pruners.calibration.zeroth_order import forward_bytes
from secateur.pruners.masks import mask
from secateur.pruners.models.anatomy import Anatomy, Block, Linear

SPARSITY = 0.5
"""Sparsity of the reference model that tokens' damage is measured on: Wanda, per output, in every projection."""


@torch.no_grad()
def damage_norms(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> dict[str, Float[Tensor, " in"]]:
    """Root weighted mean square over the tokens of each input channel; of routed experts unweighted.

    The weight of a token is the divergence of its prediction, see `token_damage`.

    Returns:
        For each projection by its full name, in fp32 on its device.
    """
    weights = token_damage(anatomy, tokens).flatten()
    totals = {x.name: torch.zeros(x.in_features, device=x.weight.device) for x in anatomy.linears}
    seen: dict[str, float] = defaultdict(float)
    places: dict[str, int] = defaultdict(int)

    def hook_of(linear: Linear) -> Hook:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            name, rows = linear.name, args[0].flatten(0, -2).float()
            if linear.expert is None:
                share = weights[places[name] : places[name] + len(rows)].to(rows.device)
                places[name] += len(rows)
            else:
                share = rows.new_ones(len(rows))
            totals[name] += share @ rows.square()
            seen[name] += float(share.sum())

        return add

    walk = Walk(anatomy, tokens)
    for block in anatomy.blocks:
        walk.hidden = walk.through(block, [hook_of])
    return {name: (total / (seen[name] or 1.0)).sqrt() for name, total in totals.items()}


@torch.no_grad()
def token_damage(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> Float[Tensor, "windows length"]:
    """Divergence of each token's prediction, in nats, of the reference of `SPARSITY` from the dense model.

    Zero where a BOS token alone predicts. The live model is dense before and after.
    """
    dense, pruned = Walk(anatomy, tokens), Walk(anatomy, tokens)
    for block in anatomy.blocks:
        part, after = dense.collect(block, inputs="moments")
        masked = {
            x.name: x.weight * mask(x.weight.abs().float() * part.inputs[x.name].norm, SPARSITY)
            for x in block.linears
        }
        pruned.hidden = _through(pruned, block, masked)
        dense.hidden = after
    found = [
        _divergence(anatomy, one, other)
        for one, other in zip(torch.cat(dense.hidden), torch.cat(pruned.hidden), strict=True)
    ]
    damage = torch.stack(found)
    damage[:, : anatomy.first_scored] = 0
    return damage if bool(damage.any()) else torch.ones_like(damage)


def damage_bytes(anatomy: Anatomy, length: int) -> int:
    """About the memory of `damage_norms` beyond the model, in bytes, for windows of so many tokens."""
    widest = max(sum(linear.n_weights for linear in block.linears) for block in anatomy.blocks)
    return 8 * widest + 2 * forward_bytes(anatomy, length)


def _through(walk: Walk, block: Block, weights: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of a block with other weights."""
    dense = [(linear, linear.weight) for linear in block.linears]
    try:
        for linear, _ in dense:
            linear.point_to(weights[linear.name])
        return walk.through(block)
    finally:
        for linear, weight in dense:
            linear.point_to(weight)


def _divergence(
    anatomy: Anatomy, dense: Float[Tensor, "length width"], pruned: Float[Tensor, "length width"]
) -> Float[Tensor, " length"]:
    wanted, found = (
        anatomy.logits(anatomy.tail(x[None]))[0].float().log_softmax(-1) for x in (dense, pruned)
    )
    return (wanted.exp() * (wanted - found)).sum(-1).clamp_min(0.0)
