"""Merging of experts that go into those that stay: the weights of the kept experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from secateur.pruners.experts.evidence import ExpertEvidence
from secateur.pruners.experts.scores import reap

N_TOKENS = 1024
"""First calibration tokens on which experts' outputs are compared."""

Merged = tuple[tuple[int, ...], Mapping[str, Tensor]]
"""The kept experts, and their weights by the names that they have among the experts."""


def nothing(evidence: ExpertEvidence, kept: Sequence[int]) -> Merged:
    """The kept experts as they are."""
    return tuple(kept), {}


@torch.no_grad()
def ream(evidence: ExpertEvidence, kept: Sequence[int]) -> Merged:
    """Each other expert is merged into the kept one whose gated outputs are most like its own.

    REAM (Jha et al. 2026, arXiv 2604.04356): the kept experts are centres, channels are aligned before weights are
    averaged, and averages are weighted by REAP's scores; the router keeps the centres' rows. [INFER] The similarity is
    the mean over tokens of the cosine of the outputs times the cosine of the router's probabilities; channels are
    matched by the cosine of all their weights; blocks are not merged in turn, each behind the merged ones, unless the
    statistics are sequential. The centres are those of the chosen importance.
    """
    outputs = _outputs(evidence)
    likeness = _cosines(outputs) * _gates_alike(evidence)
    return _into_nearest(evidence, kept, likeness, reap(evidence), aligned=True)


@torch.no_grad()
def mc_smoe(evidence: ExpertEvidence, kept: Sequence[int]) -> Merged:
    """Each other expert is merged into the kept one that the router's logits choose alike.

    M-SMoE, the merging of MC-SMoE (Li et al. 2024, arXiv 2310.01334): experts are grouped around dominant ones by the
    cosine of their logits over the tokens, channels are aligned, averages are weighted by the numbers of routed
    tokens. Differences: the dominant experts are those of the chosen importance (`frequency` there), and the router
    keeps their rows alone, where M-SMoE keeps all rows and points them to the merged experts.
    """
    return _into_nearest(evidence, kept, _gates_alike(evidence), evidence.n_routed, aligned=True)


@torch.no_grad()
def hc_smoe(evidence: ExpertEvidence, kept: Sequence[int]) -> Merged:
    """Experts are clustered by their mean outputs over all tokens, and each cluster is averaged.

    HC-SMoE (Chen et al. 2025, arXiv 2410.08589): agglomerative clustering, average linkage, Euclidean distances;
    averages weighted by the numbers of routed tokens, without alignment. Of each cluster the expert that tokens are
    routed to most often gives its number and its row of the router, where HC-SMoE keeps all rows and points them to
    the merged experts; so the importance does not matter here. In a router that is limited to groups, each group is
    clustered by itself.
    """
    mixture = evidence.mixture
    means = np.stack([output.double().mean(0).cpu().numpy() for output in _outputs(evidence)])
    size, n_kept = mixture.n_experts // mixture.n_groups, len(kept) // mixture.n_groups
    groups: list[list[int]] = []
    for first in range(0, mixture.n_experts, size):
        labels = _clusters(means[first : first + size], n_kept)
        groups += [[first + int(i) for i in np.flatnonzero(labels == x)] for x in np.unique(labels)]
    often = evidence.n_routed.tolist()
    centres = {max(group, key=often.__getitem__): group for group in groups}
    return _averaged(evidence, centres, evidence.n_routed, aligned=False)


def _clusters(points: Float[np.ndarray, "experts width"], n_clusters: int) -> Any:
    """A label for each; exactly so many clusters."""
    if n_clusters == len(points):
        return np.arange(len(points))
    return cut_tree(linkage(points, "average"), n_clusters=[n_clusters])[:, 0]


def _outputs(evidence: ExpertEvidence) -> list[Float[Tensor, "tokens width"]]:
    few = ExpertEvidence(**{**vars(evidence), "hidden": evidence.hidden[:N_TOKENS]})
    return [few.outputs(expert) for expert in range(evidence.mixture.n_experts)]


def _cosines(rows: Sequence[Float[Tensor, "tokens width"]]) -> Float[Tensor, "experts experts"]:
    """Mean over the tokens of the cosine of two experts' outputs."""
    unit = torch.stack([F.normalize(x.double(), dim=-1) for x in rows])
    return torch.einsum("etw,ftw->ef", unit, unit) / unit.shape[1]


def _gates_alike(evidence: ExpertEvidence) -> Float[Tensor, "experts experts"]:
    """Cosine over the tokens of two experts' logits."""
    unit = F.normalize(evidence.logits.double(), dim=0)
    return unit.T @ unit


def _into_nearest(
    evidence: ExpertEvidence,
    kept: Sequence[int],
    likeness: Float[Tensor, "experts experts"],
    weights: Float[Tensor, " experts"],
    *,
    aligned: bool,
) -> Merged:
    """Each other expert joins the kept one that it is most like."""
    centres: dict[int, list[int]] = {expert: [expert] for expert in kept}
    for expert in range(evidence.mixture.n_experts):
        if expert not in centres:
            nearest = max(kept, key=lambda centre: float(likeness[expert, centre]))
            centres[nearest].append(expert)
    return _averaged(evidence, centres, weights, aligned=aligned)


def _averaged(
    evidence: ExpertEvidence,
    centres: Mapping[int, Sequence[int]],
    weights: Float[Tensor, " experts"],
    *,
    aligned: bool,
) -> Merged:
    """Weighted means of each group's parameters, in fp32; equal weights where all of a group are 0."""
    experts, found = evidence.mixture.experts, dict[str, Tensor]()
    for centre, group in centres.items():
        if len(group) == 1:
            continue
        shares = torch.stack([weights[expert] for expert in group]).double().clamp_min(0)
        shares = shares / shares.sum() if float(shares.sum()) > 0 else torch.full_like(shares, 1 / len(group))
        total: dict[str, Tensor] = {}
        for expert, share in zip(group, shares.tolist(), strict=True):
            same = not aligned or expert == centre
            own = (
                dict(experts[expert].named_parameters())
                if same
                else _aligned(experts[expert], experts[centre])
            )
            for name, value in own.items():
                total[name] = total.get(name, 0.0) + share * value.data.float()
        dense = dict(experts[centre].named_parameters())
        found |= {f"{centre}.{name}": value.to(dense[name].dtype) for name, value in total.items()}
    return tuple(sorted(centres)), found


def _aligned(expert: nn.Module, centre: nn.Module) -> dict[str, Tensor]:
    """Parameters of an expert with its channels in the order in which they fit the centre's best.

    The assignment maximises the sum of the inner products of channels' normalised weights.
    """
    order = linear_sum_assignment(-(_channels(centre) @ _channels(expert).T).cpu().numpy())[1]
    index = torch.from_numpy(order)
    found = {}
    for name, value in expert.named_parameters():
        axis = None if name == "down_proj.bias" else 1 if name.startswith("down_proj") else 0
        found[name] = value.data if axis is None else value.data.index_select(axis, index.to(value.device))
    return found


def _channels(expert: nn.Module) -> Float[Tensor, "channels weights"]:
    """All weights of each channel, of length 1."""
    rows = [
        value.data.T if name.startswith("down_proj") else value.data
        for name, value in expert.named_parameters()
        if value.ndim == 2
    ]
    return F.normalize(torch.cat([row.float() for row in rows], 1), dim=1)
