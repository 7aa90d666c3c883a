"""Not All Experts: the experts to keep by the error of the mixture's output without the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from secateur.pruners.experts.evidence import ExpertEvidence
from secateur.pruners.models.mixture import LiveMixture, Mixture

Loss = Callable[[tuple[int, ...]], float]
"""Loss of the layer when it keeps a set of experts."""

N_TOKENS = 2048
EXHAUSTIVE = 128
"""Most sets of kept experts that are all tried."""


@torch.no_grad()
def kept_by_output(evidence: ExpertEvidence, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """For each count the experts with which the mixture's output changes least, in the Frobenius norm.

    Not All Experts are Equal (Lu et al. 2024, arXiv 2402.14800): every set of so many experts is tried, the router
    choosing among them anew. Where there are more than 128 sets experts are removed one by one (one of each group of a
    router that is limited to groups), each time the one whose loss is least. The first 2,048 calibration tokens count.
    As in the released code's layer-wise pruning (https://github.com/Lucky-Lance/Expert_Sparsity), but that it adds up
    norms of batches, where this is one norm over all tokens.

    Args:
        evidence: of the whole mixture.
        counts: numbers of experts to keep.
    """
    mixture = evidence.mixture
    hidden = evidence.hidden[:N_TOKENS]
    live = LiveMixture(mixture)
    wanted = _output(mixture, hidden)

    def loss(kept: tuple[int, ...]) -> float:
        live.cut(kept)
        try:
            return float((_output(mixture, hidden) - wanted).square().sum())
        finally:
            live.restore()

    everything = tuple(range(mixture.n_experts))
    left = {mixture.n_experts: everything}
    for count in sorted(counts, reverse=True):
        if comb(mixture.n_experts, count) > EXHAUSTIVE:
            while min(left) > count:
                kept = _greedily(evidence, left[min(left)], loss)
                left[len(kept)] = kept
    return [left[count] if count in left else _best(mixture, count, loss) for count in counts]


def _best(mixture: Mixture, count: int, loss: Loss) -> tuple[int, ...]:
    """The best of all sets of so many experts, as many of each group."""
    sets = combinations(range(mixture.n_experts), count)
    return min((x for x in sets if len(set(mixture.groups_of(x))) == 1), key=loss)


def _greedily(evidence: ExpertEvidence, kept: tuple[int, ...], loss: Loss) -> tuple[int, ...]:
    """Experts without the one whose loss is least; without one of each group, chosen group by group."""
    mixture, often = evidence.mixture, evidence.n_routed.tolist()
    size = mixture.n_experts // mixture.n_groups
    groups = [[x for x in kept if x // size == group] for group in range(mixture.n_groups)]
    gone = [min(group, key=often.__getitem__) for group in groups]  # until the group's turn
    for group, members in enumerate(groups):

        def without(expert: int, group: int = group) -> tuple[int, ...]:
            others = {*gone[:group], expert, *gone[group + 1 :]}
            return tuple(x for x in kept if x not in others)

        gone[group] = min(members, key=lambda expert: loss(without(expert)))
    return tuple(x for x in kept if x not in gone)


def _output(mixture: Mixture, hidden: Tensor) -> Tensor:
    output = mixture.module(hidden[None])
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first.double()
