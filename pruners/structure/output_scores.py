"""Importances of units from second moments of what the output projection sees: how much its output changes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.linalg import dampened, factor
from secateur.pruners.structure.evidence import Evidence


def llm_bip(evidence: Evidence) -> Float[Tensor, " units"]:
    """Size of what the unit adds to its sub-layer's output.

    [INFER] LLM-BIP (arXiv 2412.06419) is known by its abstract: a bound on the change of the block's output. Of a
    channel ``E|a_j| ||W_:j||``; of a KV group the root mean square over tokens of the norm of what its heads add,
    ``sqrt(tr(W_S E[a a^T]_SS W_S^T))``. How far the MLP after the attention can stretch that is one factor for
    all groups of a block, and left out.
    """
    if evidence.layout.unit_width == 1:
        return evidence.weight.square().sum(0).sqrt() * evidence.seen.mean_abs
    return contributions(evidence).diagonal().clamp_min(0.0).sqrt()


def contributions(evidence: Evidence) -> Float[Tensor, "units units"]:
    """Mean over tokens of the inner products of what two units add to the output, in fp64."""
    n_units, width = evidence.layout.n_units, evidence.layout.unit_width
    return _products(evidence).reshape(n_units, width, n_units, width).sum((1, 3))


def _products(evidence: Evidence) -> Float[Tensor, "in in"]:
    """The same of two columns: ``(W^T W) o E[a a^T]``."""
    weight = evidence.weight.double()
    return (weight.T @ weight) * evidence.seen.second_moment


def newton(evidence: Evidence) -> Float[Tensor, " units"]:
    """The relaxed mask of Numerical Pruning, up to a scale and a shift: mean over a unit's columns.

    Numerical Pruning (AAAI 2025, arXiv 2412.12441) relaxes the 0/1 mask to z, and minimises
    ``1/2 E||W a - W (z o a)||^2 + l/2 (1^T z - r)^2`` by Newton's method. As it is quadratic one step is exact:
    ``(A + l 11^T) z = A 1 + l r 1`` with ``A = (W^T W) o E[a a^T]``, so that ``z = 1 - c A^-1 1`` with c > 0 for
    all l > 0 and r below the number of columns. The order is therefore that of ``-A^-1 1``, the same for every
    sparsity. A gets `damp` of its mean diagonal, to be inverted. To be pooled over layers the masks themselves are
    needed, which `spaces.recipe.thresholds` makes of this; the paper's compensation is the repair `obs`.
    """
    products = dampened(_products(evidence), evidence.damp)
    ones = products.new_ones(len(products), 1)
    solved = torch.cholesky_solve(ones, factor(products, evidence.layout.output.name))[:, 0]
    return -evidence.by_unit(solved).mean(1)


def greedy_output(evidence: Evidence) -> Float[Tensor, " units"]:
    """Greedy output approximation: channels by the loss after a re-fit, KV groups by similarity.

    [INFER] Greedy Output Approximation (CPAL 2025, arXiv 2407.19126) is known by its abstract. Of a channel
    ``||W_:j||^2 / [(E[a a^T] + damp)^-1]_jj``: the error that is left when all others are fitted anew. Of groups the
    one goes first, again and again, whose output is most like that of one that is left, by the absolute cosine of
    their outputs over the tokens; of such a pair, the one that adds less. Its re-fit is the repair `refit`.
    """
    if evidence.layout.unit_width > 1:
        return _by_similarity(contributions(evidence))
    name = evidence.layout.output.name
    inverse = torch.cholesky_inverse(factor(dampened(evidence.seen.second_moment, evidence.damp), name))
    return evidence.weight.double().square().sum(0) / inverse.diagonal()


def _by_similarity(products: Float[Tensor, "units units"]) -> Float[Tensor, " units"]:
    """When each unit goes, as a share of the units; of equal ones the first."""
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
