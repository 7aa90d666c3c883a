"""TransAct's importance of units: norms of the activations between the projections of a sub-layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.structure.evidence import Evidence

LARGEST = 10.0
"""Weight of a head's largest channel, over the number of its channels."""


def transact(evidence: Evidence) -> Float[Tensor, " units"]:
    """L2 norm over tokens of a channel's input to the output projection; of heads ``mean + 10 / d max`` of d channels.

    TransAct (Shen et al. 2024, ACL Findings) and its released code (XiaoMi/transact-pruning). A KV group has the mean
    over its query heads, where the code knows heads alone; its cut of channels within heads has no counterpart here.
    The published schedule, eight rounds with training in each, is the recipe ``transact``.
    """
    norms = evidence.by_unit(evidence.seen.sum_squares).sqrt()
    layout = evidence.layout
    if layout.kind != "attention" or norms.shape[1] % layout.head_dim:
        return norms.mean(1)
    heads = norms.unflatten(1, (-1, layout.head_dim))
    by_head: Tensor = heads.mean(2) + LARGEST / layout.head_dim * heads.amax(2)
    return by_head.mean(1)
