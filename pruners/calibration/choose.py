"""Choice of calibration windows from pools: frozen subsets, quantiles of the loss, clusters of states."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from scipy.cluster.vq import kmeans, vq
from scipy.spatial.distance import cdist
from torch import Tensor

from secateur.pruners.calibration.pool import Pool
from secateur.pruners.calibration.tokens import begin
from secateur.spaces.recipe.keys import CHUNK

CLUSTERS = 8
"""Clusters of the windows of a source; fewer where windows are alike."""

_RESTARTS = 4


@dataclass(frozen=True)
class _Windows:
    """The windows of one length of one source, consecutive, from the pool's first token on.

    Args:
        pool: of the source.
        length: tokens of a window.
        seed: of all random choices of the source.
    """

    pool: Pool
    length: int
    seed: Sequence[int]

    @property
    def n(self) -> int:
        return len(self.pool.tokens) // self.length

    @property
    def tokens(self) -> Int64[Tensor, "windows length"]:
        return self.pool.tokens[: self.n * self.length].view(self.n, self.length)

    def means(self, of_chunks: Tensor | None) -> np.ndarray:
        """Means of values of chunks over those of each window, in fp64: ``windows`` or ``windows width``."""
        if of_chunks is None:
            raise RuntimeError("Expected pools that the model has looked at: build them with `look`.")
        n_chunks = self.length // CHUNK
        rows = of_chunks[: self.n * n_chunks].double()
        return rows.view(self.n, n_chunks, *rows.shape[1:]).mean(1).numpy()


Eligible = Callable[[_Windows, Mapping[str, Any]], np.ndarray]
"""Ascending indices of the windows that may be drawn."""


def _all(windows: _Windows, calibration: Mapping[str, Any]) -> np.ndarray:
    return np.arange(windows.n)


def _between_quantiles(windows: _Windows, calibration: Mapping[str, Any]) -> np.ndarray:
    """By rank: adjacent ranges share no window and leave none out; ties are in the text's order."""
    low, high = (round(share * windows.n) for share in calibration["quantiles"])
    return np.sort(np.argsort(windows.means(windows.pool.nll), kind="stable")[low:high])


def _in_clusters(windows: _Windows, calibration: Mapping[str, Any]) -> np.ndarray:
    return np.flatnonzero(np.isin(clusters_of(windows), calibration["clusters"]))


def clusters_of(windows: _Windows) -> np.ndarray:
    """The cluster of each window: k-means of mean hidden states, the largest cluster first.

    Of four runs from seeded k-means++ starts the one of least distortion.
    """
    states = windows.means(windows.pool.states)
    n_clusters = min(CLUSTERS, len(np.unique(states, axis=0)))
    rng = np.random.default_rng([*windows.seed, CLUSTERS])
    runs = (kmeans(states, _start(states, n_clusters, rng)) for _ in range(_RESTARTS))
    centroids, _ = min(runs, key=lambda run: run[1])
    labels = vq(states, centroids)[0]
    by_size = np.argsort(-np.bincount(labels, minlength=n_clusters), kind="stable")
    return np.argsort(by_size)[labels]


def _start(states: np.ndarray, n_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Windows far from each other: k-means++ (Arthur and Vassilvitskii 2007, section 2.2)."""
    chosen = [int(rng.integers(len(states)))]
    while len(chosen) < n_clusters:
        distances = cdist(states, states[chosen], "sqeuclidean").min(1)
        chosen.append(int(rng.choice(len(states), p=distances / distances.sum())))
    return states[chosen]


# Of each choice the windows that may be drawn, and a description for errors.
_CHOICES: dict[str, tuple[Eligible, Callable[[Mapping[str, Any]], str]]] = {
    "random": (_all, lambda calibration: ""),
    "loss": (
        _between_quantiles,
        lambda calibration: " between the quantiles {} and {} of the loss".format(*calibration["quantiles"]),
    ),
    "clusters": (_in_clusters, lambda calibration: f" in the clusters {list(calibration['clusters'])}"),
}


def choose(
    pools: Mapping[str, Pool], calibration: Mapping[str, Any], seed: int, bos: int | None = None
) -> Int64[Tensor, "samples length"]:
    """The calibration windows of a recipe.

    Fewer samples of the same choice are the first ones of more. Sources of a mixture alternate: each sample is of
    the source that is furthest below its share, so that each has its share to within one sample.

    Args:
        pools: by the source's name.
        calibration: section of a recipe's plain form, all keys that its choice needs.
        seed: of the study. Random subsets and clusters depend on it, and on the whole pool.
        bos: token that windows begin with, see `begin`.

    Raises:
        ValueError: if there are too few windows, the length does not fit, or a source is unknown.
    """
    length = calibration["length"]
    eligible, described = _CHOICES[calibration["choose"]]
    if eligible is not _all and length % CHUNK:
        raise ValueError(
            f"Expected `calibration.length` to be a multiple of {CHUNK} with `choose: {calibration['choose']}`, "
            f"got {length}. Take {max(1, round(length / CHUNK)) * CHUNK}, or `choose: random`."
        )
    turns = sources_of(calibration)
    drawn = {}
    for name in sorted(set(turns)):
        if name not in pools:
            raise ValueError(
                f"Expected the sources of `calibration` among {sorted(pools)}, got {name!r}. Name it in `sources`."
            )
        windows = _Windows(pools[name], length, _seed(name, seed))
        found = _draw(windows, eligible, calibration)
        if len(found) < turns.count(name):
            raise ValueError(
                f"Expected at least {turns.count(name)} windows of {length} tokens of source {name!r}"
                f"{described(calibration)}, got {len(found)}. Take fewer or shorter samples, a wider choice, a "
                "longer text, or a larger `pool_tokens`."
            )
        drawn[name] = iter(found)
    return begin(torch.stack([next(drawn[name]) for name in turns]), bos)


def most_samples(pools: Mapping[str, Pool], calibration: Mapping[str, Any], n: int, seed: int) -> int:
    """As many samples of a choice as the pools have, up to `n`, see `choose`."""
    eligible, _ = _CHOICES[calibration["choose"]]
    counts = {
        name: len(
            _draw(_Windows(pools[name], calibration["length"], _seed(name, seed)), eligible, calibration)
        )
        for name, weight in calibration["sources"].items()
        if weight
    }
    turns = sources_of({**calibration, "samples": min(n, sum(counts.values()))})
    taken = dict.fromkeys(counts, 0)
    for place, name in enumerate(turns):
        if taken[name] == counts[name]:
            return place
        taken[name] += 1
    return len(turns)


def _seed(name: str, seed: int) -> tuple[int, int]:
    """Seed of all random choices of a source."""
    return seed, zlib.crc32(name.encode())


def _draw(
    windows: _Windows, eligible: Eligible, calibration: Mapping[str, Any]
) -> Int64[Tensor, "windows length"]:
    """All windows that may be drawn, in one random order of the source: choices that overlap keep it."""
    if not windows.n:
        return windows.tokens
    rng = np.random.default_rng([*windows.seed, calibration.get("subset", 0)])
    order = rng.permutation(windows.n)
    return windows.tokens[torch.from_numpy(order[np.isin(order, eligible(windows, calibration))])]


def sources_of(calibration: Mapping[str, Any]) -> tuple[str, ...]:
    """The source of each window of `choose`; of those equally far below their shares the first by name."""
    shares, samples = calibration["sources"], calibration["samples"]
    names, total = sorted(shares), sum(shares.values())
    counts = dict.fromkeys(names, 0)
    turns = list[str]()
    for n in range(1, samples + 1):
        turns.append(max(names, key=lambda name: shares[name] * n - counts[name] * total))
        counts[turns[-1]] += 1
    return tuple(turns)
