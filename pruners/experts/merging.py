"""Merging of experts that go into those that stay: the weights of the kept experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
"""First calibration tokens on which experts' outputs and activations are compared."""

Cost = Callable[[nn.Module, nn.Module], Float[Tensor, "channels channels"]]
"""From two experts to the cost of each pair of their channels."""

Merged = tuple[tuple[int, ...], Mapping[str, Tensor]]
"""The kept experts, and their weights by the names that they have among the experts."""


def nothing(evidence: ExpertEvidence, kept: Sequence[int]) -> Merged:
    """The kept experts as they are."""
    return tuple(kept), {}


@torch.no_grad()
def ream(evidence: ExpertEvidence, kept: Sequence[int]) -> Merged:
    """Most other experts are merged into the kept ones of the highest scores, by their gated outputs and logits.

    REAM (Jha et al. 2026, arXiv 2604.04356), as its released code has it
    (https://github.com/SamsungSAILMontreal/ream). The likeness of two experts is the mean of that of their mean gated
    outputs, a cosine, and that of their logits over the tokens, a distance. The kept experts, from the highest score
    on, each take the experts most like them of those that are left, until their groups are full: so the last ones
    stay as they are. Channels are aligned by activations and weights, averages are weighted by REAP's scores; the
    router keeps the rows of the kept experts.

    Differences: the kept experts are those of the chosen importance (REAP there); weights are compared without a
    reduction to 64 dimensions; statistics of a block are those behind merged ones only where they are sequential.
    [INFER] Groups are of 16 of 128 experts there, of an eighth of the experts, but of 2 at least, here.
    """
    saliency = reap(evidence)
    used = saliency[saliency > 0]
    if len(used):
        saliency = saliency.where(saliency > 0, used.min().clamp_max(0.5))
    outputs, mixture = _gated_means(evidence), evidence.mixture
    alike = ((outputs @ outputs.T + 1) / 2 + _logits_near(evidence)) / 2
    size = max(mixture.n_experts // 8, 2, -(-mixture.n_experts // len(kept)))
    free = set(range(mixture.n_experts)) - set(kept)
    centres: dict[int, list[int]] = {}
    for centre in sorted(kept, key=lambda expert: -float(saliency[expert])):
        nearest = sorted(free, key=lambda expert: -float(alike[centre, expert]))[: size - 1]
        centres[centre] = [centre, *nearest]
        free -= set(nearest)
    return _averaged(evidence, centres, saliency, _by_activations(evidence))


@torch.no_grad()
def mc_smoe(evidence: ExpertEvidence, kept: Sequence[int]) -> Merged:
    """Each other expert is merged into the kept one that the router's logits choose alike.

    M-SMoE, the merging of MC-SMoE (Li et al. 2024, arXiv 2310.01334): experts are grouped around dominant ones by the
    cosine of their logits over the tokens, channels are aligned, averages are weighted by the numbers of routed
    tokens. Differences: the dominant experts are those of the chosen importance and allocation (there `frequency`, with
    one threshold for all blocks), and the router keeps their rows alone, where M-SMoE keeps all rows and points them to
    the merged experts.
    """
    centres: dict[int, list[int]] = {expert: [expert] for expert in kept}
    alike = _gates_alike(evidence)
    for expert in range(evidence.mixture.n_experts):
        if expert not in centres:
            centres[max(kept, key=lambda centre: float(alike[expert, centre]))].append(expert)
    return _averaged(evidence, centres, evidence.n_routed, _by_weights)


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
    return _averaged(evidence, centres, evidence.n_routed, None)


def _clusters(points: Float[np.ndarray, "experts width"], n_clusters: int) -> Any:
    """A label for each; exactly so many clusters."""
    if n_clusters == len(points):
        return np.arange(len(points))
    return cut_tree(linkage(points, "average"), n_clusters=[n_clusters])[:, 0]


def _outputs(evidence: ExpertEvidence) -> list[Float[Tensor, "tokens width"]]:
    few = ExpertEvidence(**{**vars(evidence), "hidden": evidence.hidden[:N_TOKENS]})
    return [few.outputs(expert) for expert in range(evidence.mixture.n_experts)]


def _gated_means(evidence: ExpertEvidence) -> Float[Tensor, "experts width"]:
    """Mean over the tokens of each expert's outputs times the router's probabilities, of length 1."""
    gates = evidence.logits[:N_TOKENS].double().softmax(-1)
    rows = [
        gates[:, expert, None].mul(output.double()).mean(0)
        for expert, output in enumerate(_outputs(evidence))
    ]
    return F.normalize(torch.stack(rows), dim=-1)


def _logits_near(evidence: ExpertEvidence) -> Float[Tensor, "experts experts"]:
    """One minus the distance between two experts' logits over the tokens, of length 1; the farthest two are at 0."""
    rows = F.normalize(evidence.logits.double(), dim=0).T
    distances = torch.cdist(rows, rows)
    return 1 - distances / distances.max().clamp_min(1e-12)


def _gates_alike(evidence: ExpertEvidence) -> Float[Tensor, "experts experts"]:
    """Cosine over the tokens of two experts' logits."""
    unit = F.normalize(evidence.logits.double(), dim=0)
    return unit.T @ unit


def _averaged(
    evidence: ExpertEvidence,
    centres: Mapping[int, Sequence[int]],
    weights: Float[Tensor, " experts"],
    cost: Cost | None,
) -> Merged:
    """Weighted means of each group's parameters, in fp32; equal weights where all of a group are 0.

    Args:
        cost: of pairs of channels that are averaged; None: they are averaged as they stand.
    """
    experts, found = evidence.mixture.experts, dict[str, Tensor]()
    for centre, group in centres.items():
        if len(group) == 1:
            continue
        shares = torch.stack([weights[expert] for expert in group]).double().clamp_min(0)
        shares = shares / shares.sum() if float(shares.sum()) > 0 else torch.full_like(shares, 1 / len(group))
        total: dict[str, Tensor] = {}
        for expert, share in zip(group, shares.tolist(), strict=True):
            own = dict(experts[expert].named_parameters())
            if cost is not None and expert != centre:
                own = _aligned(own, cost(experts[centre], experts[expert]))
            for name, value in own.items():
                total[name] = total.get(name, 0.0) + share * value.data.float()
        dense = dict(experts[centre].named_parameters())
        found |= {f"{centre}.{name}": value.to(dense[name].dtype) for name, value in total.items()}
    return tuple(sorted(centres)), found


def _aligned(expert: Mapping[str, nn.Parameter], cost: Float[Tensor, "channels channels"]) -> dict[str, Any]:
    """Parameters of an expert with its channels in the order in which they fit the centre's at the least cost."""
    order = linear_sum_assignment(cost.cpu().numpy())[1]
    index = torch.from_numpy(order)
    found = {}
    for name, value in expert.items():
        axis = None if name == "down_proj.bias" else 1 if name.startswith("down_proj") else 0
        found[name] = value if axis is None else value.data.index_select(axis, index.to(value.device))
    return found


def _by_weights(centre: nn.Module, expert: nn.Module) -> Float[Tensor, "channels channels"]:
    """Minus the inner products of channels' normalised weights."""
    return -(_channels(centre) @ _channels(expert).T)


def _by_activations(evidence: ExpertEvidence) -> Cost:
    """Distances between channels' normalised activations plus those between their normalised weights."""
    hidden = evidence.hidden[:N_TOKENS]

    def cost(centre: Any, expert: Any) -> Float[Tensor, "channels channels"]:
        one, other = (F.normalize(x.channels(hidden).float().T, dim=1) for x in (centre, expert))
        return torch.cdist(one, other) + torch.cdist(_channels(centre), _channels(expert))

    return cost


def _channels(expert: nn.Module) -> Float[Tensor, "channels weights"]:
    """All weights of each channel, of length 1."""
    rows = [
        value.data.T if name.startswith("down_proj") else value.data
        for name, value in expert.named_parameters()
        if value.ndim == 2
    ]
    return F.normalize(torch.cat([row.float() for row in rows], 1), dim=1)
