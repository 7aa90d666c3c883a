"""MKA: fusion of neighbouring blocks whose activations lie on similar manifolds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import stream_states
from secateur.pruners.depth.merge_targets import DroppedRun, Fitting, merged_tensors
from secateur.pruners.models.anatomy import Anatomy

N_SAMPLES = 256  # tokens whose states are compared
N_DIMENSIONS = 2  # of the embedded manifolds


@torch.no_grad()
def fused(anatomy: Anatomy, run: DroppedRun, similarities: tuple[float, ...]) -> dict[str, Tensor]:
    """Parameters of the merge target with those of the dropped blocks fused in, from the dense model.

    ``theta = r theta_i + (1 - r) theta_j`` (MKA, Liu et al. 2024, arXiv 2406.16330), one block j after the other,
    norms and biases too. [INFER] The paper lets the ratio follow from the similarity: here r = sigmoid(S_ij), from
    0.5 to 0.73. In the released code r is always about 0.62, the last two blocks are fused whatever is similar, and
    what is fused does not reach the model, so that it drops the last blocks; none of that is repeated here.

    Args:
        anatomy: the dense model.
        run: the blocks.
        similarities: as `neighbour_similarities` gives them.
    """
    merged, *others = merged_tensors(anatomy, run)
    for index, other in zip(run.dropped, others, strict=True):
        ratio = 1 / (1 + math.exp(-similarities[index]))
        merged = {
            name: torch.lerp(other[name].float(), theta.float(), ratio) for name, theta in merged.items()
        }
    return {name: theta.to(others[0][name].dtype) for name, theta in merged.items()}


def by_similarity(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """One minus the similarity to the block before, so that the most similar are dropped first; block 0 never is."""
    return (math.inf, *(1 - s for s in neighbour_similarities(anatomy, tokens)[1:]))


@torch.no_grad()
def neighbour_similarities(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> tuple[float, ...]:
    """Normalised pairwise information bottleneck of each block's output with that of the block before, in [0, 1].

    Of MKA (arXiv 2406.16330): the outputs of a block are embedded by a diffusion map with the kernel
    ``exp(-(d / scale)^0.5)``; coordinates become ranks; the similarity is ``I / sqrt(H_i H_j)``, mean over the
    coordinates. Simpler than there: the scale is the median distance, not 8; entropies and information are those of
    equally filled bins, not of nearest neighbours; and samples are 256 tokens evenly spaced over the first windows,
    not one state for each of many questions. The first token of a window is none: in many models its state is far off.

    Returns:
        For each block; 0 for the first.
    """
    few = tokens[: math.ceil(2 * N_SAMPLES / tokens.shape[1])]
    binned = [_bins(diffusion_map(_samples(states))) for states in stream_states(anatomy, few)][1:]
    return (0.0, *(_information(one, other) for one, other in pairwise(binned)))


def _samples(states: Float[Tensor, "windows length width"]) -> Float[Tensor, "samples width"]:
    rows = states[:, 1:].flatten(0, 1)
    count = min(N_SAMPLES, len(rows))
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


def diffusion_map(states: Float[Tensor, "samples width"]) -> Float[Tensor, "samples dimensions"]:
    """Coordinates of the samples along the slowest modes of a diffusion between them, the constant one left out.

    Density is normalised with the exponent 0.5 (Coifman and Lafon 2006, https://doi.org/10.1016/j.acha.2006.04.006).
    The sign of a coordinate means nothing.
    """
    distances = torch.cdist(states.double(), states.double())
    scale = distances.median()
    kernel = (-(distances / torch.where(scale > 0, scale, 1.0)).sqrt()).exp()
    for _ in ("density", "degree"):
        root = kernel.sum(1).sqrt()
        kernel = kernel / torch.outer(root, root)
    modes: Tensor = torch.linalg.eigh(kernel).eigenvectors.flip(1)
    return modes[:, 1 : 1 + N_DIMENSIONS] / modes[:, :1]


def _bins(coordinates: Float[Tensor, "samples dimensions"]) -> Int[Tensor, "samples dimensions"]:
    """Ranks in equally filled bins, about four samples to a pair of bins; leftover samples share the last."""
    n = len(coordinates)
    n_bins = n_bins_for(n)
    ranks = coordinates.argsort(dim=0, stable=True).argsort(dim=0)
    return (ranks // (n // n_bins)).clamp_max(n_bins - 1)


def n_bins_for(n_samples: int) -> int:
    """Number of bins of a coordinate."""
    return max(2, math.isqrt(n_samples // 4))


def _information(one: Int[Tensor, "samples dimensions"], other: Int[Tensor, "samples dimensions"]) -> float:
    n_samples, n_bins = len(one), n_bins_for(len(one))
    found = []
    for x, y in zip(one.T, other.T, strict=True):
        joint = torch.bincount(x * n_bins + y, minlength=n_bins**2).reshape(n_bins, n_bins).double()
        joint = joint / n_samples
        entropies = [_entropy(p) for p in (joint.sum(1), joint.sum(0), joint)]
        found.append((entropies[0] + entropies[1] - entropies[2]) / (entropies[0] * entropies[1]).sqrt())
    return float(torch.stack(found).mean())


def _entropy(p: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    found: Tensor = -torch.special.xlogy(p, p).sum()
    return found


def fused_by_similarity(
    anatomy: Anatomy, runs: Sequence[DroppedRun], tokens: Int[Tensor, "windows length"], fitting: Fitting
) -> dict[int, dict[str, Tensor]]:
    """`fused` of each run."""
    similarities = neighbour_similarities(anatomy, tokens)
    return {run.target: fused(anatomy, run, similarities) for run in runs}
