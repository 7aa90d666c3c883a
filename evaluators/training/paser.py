"""PASER: choice of the windows that a pruned model is recovered on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor

from secateur.evaluators.training.concepts import ConceptGraph, concepts_of
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.losses import CHUNK_TOKENS, head_inputs

N_CLUSTERS = 10
"""Clusters of capabilities; fewer of few windows."""

MOST = 1024
"""Windows that are looked at, evenly spread over the training text."""

_UPDATES = 200
"""Multiplicative updates of the factorisation."""


@torch.no_grad()
def choose_windows(
    dense: Anatomy,
    pruned: Anatomy,
    windows: Int[Tensor, "windows length"],
    share: float,
    texts: Sequence[str],
    seed: int,
) -> Int[Tensor, "chosen length"]:
    """Windows on which pruning has done the most damage, of all capabilities (PASER, He et al. 2025, arXiv 2502.12594).

    Windows are clustered by what they are about, each cluster gets a part of the budget in proportion to its mean
    divergence between the dense and the pruned model, and of its windows those of the largest divergence are chosen,
    but for those whose concepts contradict the chosen ones.

    Differences from the released code: samples are windows of a text and not instructions, so that they cost alike and
    efficiency is divergence; a window's place is the mean of the dense model's last hidden states in place of a
    sentence encoder's; divergences are means over tokens, and not sums; a window's concepts are few, see `concepts_of`,
    as all phrases of a long window would contradict each other.

    Args:
        dense: with weights of its own.
        pruned: not changed.
        windows: token ids.
        share: of the windows that are looked at, to choose at most, in (0, 1].
        texts: of the windows.
        seed: of the factorisation.

    Returns:
        The chosen windows in their order, at least one.
    """
    places = torch.linspace(0, len(windows) - 1, min(MOST, len(windows))).round().long()
    rows = [_look(dense, pruned, window[None]) for window in windows[places]]
    states = torch.stack([state for state, _ in rows]).double().numpy()
    damage = np.array([divergence for _, divergence in rows])
    labels = clusters_of(states, N_CLUSTERS, seed)
    order = picked(labels, damage, max(1, round(share * len(places))), [texts[i] for i in places.tolist()])
    return windows[places[sorted(order)]]


def clusters_of(
    states: Float64[np.ndarray, "windows width"], n_clusters: int, seed: int
) -> NDArray[np.int64]:
    """Cluster of each window: a factorisation of the affinities of its coordinates on the diffusion manifold.

    The affinities are Gaussian with the median distance as their width; the coordinates are the first eigenvectors of
    the random walk's Laplacian; the product of their rows, without signs, is factorised into nonnegative matrices, and
    a window belongs to its largest factor.
    """
    n_clusters = min(n_clusters, len(np.unique(states, axis=0)))
    distances = cdist(states, states)
    width = np.median(distances) or 1.0
    affinity = np.exp(-(distances**2) / (2 * width**2))
    root = np.sqrt(affinity.sum(1))
    _, vectors = np.linalg.eigh(np.eye(len(states)) - affinity / np.outer(root, root))
    coordinates = vectors[:, :n_clusters] / root[:, None]
    similar = np.abs(coordinates @ coordinates.T)
    found: NDArray[np.int64] = _factor(similar / similar.max(), n_clusters, seed).argmax(1)
    return found


def picked(
    labels: NDArray[np.int64], damage: NDArray[np.float64], n_most: int, texts: Sequence[str]
) -> list[int]:
    """Numbers of the chosen windows, cluster by cluster; the most damaged of all if budgets are too small for one."""
    graph, chosen = ConceptGraph(), list[int]()
    clusters = np.unique(labels)
    means = np.array([damage[labels == cluster].mean() for cluster in clusters])
    total = means.sum() or 1.0
    for cluster, mean in zip(clusters, means, strict=True):
        budget = int(n_most * mean / total)
        inside = np.flatnonzero(labels == cluster)
        for index in inside[np.argsort(-damage[inside], kind="stable")].tolist():
            if budget == 0:
                break
            concepts = concepts_of(texts[index])
            if not graph.conflicts(concepts):
                graph.add(concepts)
                chosen.append(index)
                budget -= 1
    return chosen or [int(damage.argmax())]


def _factor(matrix: NDArray[np.float64], rank: int, seed: int) -> NDArray[np.float64]:
    """Left factor of a nonnegative matrix (Lee and Seung 2001)."""
    rng = np.random.default_rng(seed)
    left, right = rng.random((len(matrix), rank)), rng.random((rank, len(matrix)))
    tiny = np.finfo(np.float64).tiny
    for _ in range(_UPDATES):
        right *= (left.T @ matrix) / np.maximum(left.T @ left @ right, tiny)
        left *= (matrix @ right.T) / np.maximum(left @ (right @ right.T), tiny)
    return left


def _look(
    dense: Anatomy, pruned: Anatomy, window: Int[Tensor, "1 length"]
) -> tuple[Float[Tensor, " width"], float]:
    """Mean of the dense model's last states, and the mean Jensen-Shannon divergence of predictions, in nats."""
    first = dense.first_scored
    one, other = (head_inputs(anatomy, window)[0, first:] for anatomy in (dense, pruned))
    parts = zip(one.split(CHUNK_TOKENS), other.split(CHUNK_TOKENS), strict=True)
    total = sum(float(_divergences(dense.logits(a), pruned.logits(b)).sum()) for a, b in parts)
    return one.float().mean(0).cpu(), total / len(one)


def _divergences(
    one: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    first, second = (x.float().log_softmax(-1) for x in (one, other))
    middle = torch.logaddexp(first, second) - np.log(2)
    halves = torch.stack([(x.exp() * (x - middle)).sum(-1) for x in (first, second)])
    return halves.mean(0)
