"""Differentiable choice of the weights of a group that stay: a soft choice among all masks of an N:M pattern."""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor


def pattern_masks(n_keep: int, group_size: int) -> Float[Tensor, "choices group"]:
    """All masks that keep so many of a group, 1 = keep; six of 2 of 4."""
    rows = torch.zeros(0, group_size)
    for kept in combinations(range(group_size), n_keep):
        rows = torch.cat([rows, torch.zeros(1, group_size).index_fill(1, torch.tensor(kept), 1.0)])
    return rows


def gumbel_softmax(
    logits: Float[Tensor, "groups choices"], temperature: float, generator: torch.Generator
) -> Float[Tensor, "groups choices"]:
    """Softmax of ``(logits + Gumbel noise) / temperature`` (Jang et al. 2017, arXiv 1611.01144, eq. 2)."""
    noise = torch.empty_like(logits).exponential_(generator=generator).log().neg()
    return ((logits + noise) / temperature).softmax(1)


def sampled_mask(
    logits: Float[Tensor, "groups choices"],
    masks: Float[Tensor, "choices group"],
    temperature: float,
    generator: torch.Generator,
) -> Float[Tensor, "groups group"]:
    """Mean of the masks by a sampled soft choice, in [0, 1], with its gradient in the logits."""
    return gumbel_softmax(logits, temperature, generator) @ masks


def chosen_scores(
    logits: Float[Tensor, "groups choices"], masks: Float[Tensor, "choices group"]
) -> Float[Tensor, "groups group"]:
    """Score of each weight: 1 if the likeliest mask keeps it, plus its chance of being kept over 2."""
    return masks[logits.argmax(1)] + logits.softmax(1) @ masks / 2
