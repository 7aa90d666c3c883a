"""The LLM Surgeon: weights pruned in shots by Kronecker-factored curvature, the others updated together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.pruners.calibration.fisher import FEW_TOKENS, OUTPUT_DAMPENING, Moments, pass_bytes, walk_back
from secateur.pruners.linalg import dampened, factor
from secateur.pruners.masks import lowest
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.models.memory import check_memory
from secateur.pruners.models.runner import in_fp32
from secateur.spaces.levels import n_zeros

N_SHOTS = 40
N_CORRELATED = 2000
"""Pruned weights, of whole rows, whose updates are computed together."""

Weights = dict[str, Float[Tensor, "out in"]]
"""By the projection's full name."""


@torch.no_grad()
def llm_surgeon(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    sparsity: float | Mapping[str, float],
    *,
    dampening: float = 0.01,
    protected: Collection[str] = (),
    n_shots: int = N_SHOTS,
) -> Weights:
    """Pruned and updated weights of the model, which is left dense; unstructured.

    Van der Ouderaa et al. 2024 (arXiv 2312.17244). In each of 40 shots, at a share of the zeros that rises linearly:
    the empirical Fisher information B x A of every projection in the model pruned so far, of the calibration text's own
    labels; the weights of least ``w_ij^2 / (2 [B^-1]_ii [A^-1]_jj)`` (eq. 9) of all layers go, under one threshold; and
    the other weights of the projection are updated by the closed form for all that go (eq. 10), in groups of whole
    rows of at most 2,000 weights, each group seeing the updates of those before. Weights that are gone stay zero:
    they are part of later shots' groups. Dampening: 0.01 of the mean diagonal of A, 0.1 of that of B.

    Differences: exactly as many zeros as asked for; biases are kept as they are (in the released code they are a
    column of the weight, and may be pruned); matrices of rank-one Kronecker sums alone, and no interleaved low-rank
    training, both optional in the paper. Structured removal of rows and columns is another method's part here, see
    `structure.kfac`.

    It takes, in each shot, a forward and a backward pass over all tokens, and the solution of a system of 2,000
    unknowns for each 2,000 pruned weights: minutes for a million weights, not for billions.

    Args:
        anatomy: the dense model.
        tokens: calibration windows.
        sparsity: share of zeros of all weights, which one threshold spreads over the layers; or of each projection by
            its full name.
        dampening: of A.
        protected: full names of projections that are kept dense.
        n_shots: number of shots.

    Returns:
        Weights of the projections that lose some, in their dtypes.

    Raises:
        ValueError: if a gradient or an input is not finite, or there is too little memory.
    """
    linears = [linear for linear in anatomy.linears if linear.name not in protected]
    check_room(anatomy)
    stored = [(linear, linear.weight) for linear in anatomy.linears]
    gone = {linear.name: torch.zeros_like(linear.weight, dtype=torch.bool) for linear in linears}
    try:
        with in_fp32(anatomy.model):
            for shot in range(1, n_shots + 1):
                _shoot(linears, _moments(anatomy, linears, tokens), sparsity, shot / n_shots, gone, dampening)
            found = {linear.name: linear.weight for linear in linears if gone[linear.name].any()}
    finally:
        for linear, weight in stored:
            linear.point_to(weight)
    return {
        linear.name: found[linear.name].to(linear.weight.dtype) for linear in linears if linear.name in found
    }


def check_room(anatomy: Anatomy) -> None:
    """Raise a ValueError unless there is the memory for the curvature of all projections and their scores."""
    kept = sum(x.in_features**2 + x.out_features**2 + 3 * x.n_weights for x in anatomy.linears)
    check_memory(
        4 * kept + pass_bytes(anatomy, 0),
        anatomy.embedding.weight.device,
        "the curvature of all projections in the LLM Surgeon",
        "Use the metric kfac or sparsegpt.",
    )


def _moments(anatomy: Anatomy, linears: Sequence[Linear], tokens: Int[Tensor, "windows length"]) -> Moments:
    """Sums over all tokens, of the model as it is now."""
    moments, watched = Moments(), frozenset(linear.name for linear in linears)
    for part in tokens.split(max(1, FEW_TOKENS // tokens.shape[1])):
        for _ in walk_back(anatomy, part, moments.add, watched=watched, drawn=None):
            pass
    return moments


def _shoot(
    linears: Sequence[Linear],
    moments: Moments,
    sparsity: float | Mapping[str, float],
    share: float,
    gone: dict[str, Bool[Tensor, "out in"]],
    dampening: float,
) -> None:
    """Point the projections to their weights after a shot at this share of the sparsity, and mark what goes."""
    inverses = {linear.name: _inverses(linear, moments, dampening) for linear in linears}
    scores = [costs(linear.weight, *inverses[linear.name]) for linear in linears]
    scores = [score.masked_fill(gone[x.name], -1) for x, score in zip(linears, scores, strict=True)]
    if isinstance(sparsity, Mapping):
        groups = [([index], sparsity.get(linear.name, 0.0)) for index, linear in enumerate(linears)]
    else:
        groups = [([*range(len(linears))], sparsity)]
    for members, wanted in groups:
        together = torch.cat([scores[index].flatten() for index in members])
        chosen = lowest(together, n_zeros(wanted * share, len(together)))
        parts = chosen.split([linears[index].n_weights for index in members])
        for index, part in zip(members, parts, strict=True):
            gone[linears[index].name] = part.view_as(scores[index])
    for linear in linears:
        mask = gone[linear.name]
        if mask.any():
            linear.point_to(updated(linear.weight, mask, *inverses[linear.name]))


def _inverses(
    linear: Linear, moments: Moments, dampening: float
) -> tuple[Float[Tensor, "out out"], Float[Tensor, "in in"]]:
    """Inverses of the dampened B and A, in fp64; scaled alike by the number of tokens, which changes no order."""
    found = []
    for sums, size, rate in (
        (moments.gradients, linear.out_features, OUTPUT_DAMPENING),
        (moments.inputs, linear.in_features, dampening),
    ):
        moment = sums.get(linear.name)
        if moment is None:  # never called, as an expert without tokens
            moment = torch.zeros(size, size, device=linear.weight.device)
        found.append(torch.cholesky_inverse(factor(dampened(moment, rate).double(), linear.name)))
    return found[0], found[1]


def costs(
    weight: Float[Tensor, "out in"], outputs: Float[Tensor, "out out"], inputs: Float[Tensor, "in in"]
) -> Float[Tensor, "out in"]:
    """Cost of each weight alone, by the inverses of B and A (eq. 9)."""
    inverse = outputs.diagonal()[:, None] * inputs.diagonal()[None, :]
    return (weight.double().square() / (2 * inverse)).float()


def updated(
    weight: Float[Tensor, "out in"],
    gone: Bool[Tensor, "out in"],
    outputs: Float[Tensor, "out out"],
    inputs: Float[Tensor, "in in"],
    n_correlated: int = N_CORRELATED,
) -> Float[Tensor, "out in"]:
    """The weight with zeros, and the others updated for them (eq. 10), by the inverses of B and A.

    Of the weights q of a group, ``W - B^-1 M A^-1`` with ``M_q = C^-1 w_q``, ``C = (B^-1 x A^-1)_qq``.
    """
    found = weight.to(torch.float64, copy=True)
    for rows in _groups(gone, n_correlated):
        at = gone[rows].nonzero()
        i, j = rows[at[:, 0]], at[:, 1]
        system = outputs[i][:, i] * inputs[j][:, j]
        solved = torch.cholesky_solve(found[i, j][:, None], factor(system, "the weight"))[:, 0]
        spread = torch.zeros(len(rows), weight.shape[1], dtype=found.dtype, device=found.device)
        spread[at[:, 0], j] = solved
        found -= outputs[:, rows] @ (spread @ inputs)
    return found.masked_fill_(gone, 0.0).to(weight.dtype)


def _groups(gone: Bool[Tensor, "out in"], n_correlated: int) -> Iterator[Int[Tensor, " rows"]]:
    """Rows with something to prune, in runs of at most so many weights, or of one row."""
    run: list[int] = []
    n = 0
    for row, count in enumerate(gone.sum(1).tolist()):
        if not count:
            continue
        if run and n + count > n_correlated:
            yield torch.tensor(run, device=gone.device)
            run, n = [], 0
        run.append(row)
        n += count
    if run:
        yield torch.tensor(run, device=gone.device)
