"""Numerical Pruning: a relaxed mask, by one step of Newton's method."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.linalg import dampened, factor
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.llm_bip import products


def newton(evidence: Evidence) -> Float[Tensor, " units"]:
    """The relaxed mask of Numerical Pruning, up to a scale and a shift: mean over a unit's columns.

    Numerical Pruning (AAAI 2025, arXiv 2412.12441) relaxes the 0/1 mask to z, and minimises
    ``1/2 E||W a - W (z o a)||^2 + l/2 (1^T z - r)^2`` by Newton's method. As it is quadratic one step is exact:
    ``(A + l 11^T) z = A 1 + l r 1`` with ``A = (W^T W) o E[a a^T]``, so that ``z = 1 - c A^-1 1`` with c > 0 for
    all l > 0 and r below the number of columns. The order is therefore that of ``-A^-1 1``, the same for every
    sparsity. A gets `dampening` of its mean diagonal, to be inverted. To be pooled over layers the masks themselves are
    needed, which `recipes.allocation.threshold` makes of this; the paper's compensation is the repair `obs`.
    """
    moment = dampened(products(evidence), evidence.dampening)
    ones = moment.new_ones(len(moment), 1)
    solved = torch.cholesky_solve(ones, factor(moment, evidence.layout.output.name))[:, 0]
    return -evidence.by_unit(solved).mean(1)
