"""Greedy Output Approximation: channels by the error after a re-fit, KV groups by similarity."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.linalg import dampened, factor
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.llm_bip import contributions


def greedy_output(evidence: Evidence) -> Float[Tensor, " units"]:
    """Greedy output approximation: channels by the loss after a re-fit, KV groups by similarity.

    [INFER] Greedy Output Approximation (CPAL 2025, arXiv 2407.19126) is known by its abstract. Of a channel
    ``||W_:j||^2 / [(E[a a^T] + dampening)^-1]_jj``: the error that is left when all others are fitted anew. Groups are
    removed one by one: of the pair whose outputs are most alike, by their absolute cosine over the tokens, the one that
    adds less. Its re-fit is the repair `refit`.
    """
    if evidence.layout.unit_width > 1:
        return _by_similarity(contributions(evidence))
    name = evidence.layout.output.name
    inverse = torch.cholesky_inverse(factor(dampened(evidence.seen.second_moment, evidence.dampening), name))
    return evidence.weight.double().square().sum(0) / inverse.diagonal()


def _by_similarity(products: Float[Tensor, "units units"]) -> Float[Tensor, " units"]:
    """Place of each unit in the order of removal, as a share of the units; of equal ones the first."""
    size = products.diagonal().clamp_min(torch.finfo(products.dtype).tiny)
    cosine = (products / (size * size[:, None]).sqrt()).abs()
    cosine.fill_diagonal_(-1.0)
    rounds = torch.full_like(size, len(size) - 1)  # of the one that is left over
    for index in range(len(size) - 1):
        first = int(cosine.amax(1).argmax())
        pair = (first, int(cosine[first].argmax()))
        gone = min(pair, key=lambda unit: float(size[unit]))
        rounds[gone] = index
        cosine[gone] = cosine[:, gone] = -1.0  # below all cosines of those that are left
    return (rounds + 0.5) / len(size)
