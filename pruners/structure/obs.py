"""Structured optimal brain surgery: the order of greedy removal of units, and the update of the kept weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.linalg import dampened, factor, in_precision, leading_solve, no_factor
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.refit import RepairInputs

_LAZY = 128
"""Columns whose removal is applied to the whole matrices in one product."""


def obs_order(
    weight: Float[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"],
    unit_width: int,
    *,
    dampening: float,
    name: str = "the weight",
) -> Int[Tensor, " units"]:
    """The units in the order of greedy removal.

    ZipLM (Kurtic et al. 2023, arXiv 2302.04089, algorithm 1; DarwinLM, arXiv 2502.07780, uses it): with the
    Hessian ``H = E[x x^T]`` the removal of unit S, with the best update of all kept weights, costs
    ``tr(W_S (H^-1_SS)^-1 W_S^T)``. The cheapest unit is removed, the update is made, and so on; so the order is nested
    and one pass serves all levels. The updated weights are not needed for it, only their Gram matrix: after the
    pass `refit.obs_update` gives the weights of any level in closed form.

    Differences from the paper: one unit at a time, never several at once; matrices in the precision of `in_precision`;
    removals are carried over in batches, which changes rounding alone. A unit is one channel, or the columns of all
    query heads of a KV group. Ties: the smaller index first.

    Args:
        weight: of the output projection.
        second_moment: of its inputs, a token.
        unit_width: consecutive columns of a unit.
        dampening: added to the diagonal, as a fraction of its mean, > 0.
        name: the layer, for errors.
    """

    def order(precision: torch.dtype) -> list[int]:
        moment = dampened(second_moment, dampening).to(precision)
        inverse = torch.cholesky_inverse(factor(moment, name))
        product = weight.to(precision).T @ weight.to(precision)  # W^T W
        state, removed = _Lazy(inverse, product, unit_width, name), list[int]()
        while state.units:
            if state.n_pending + unit_width > max(_LAZY, unit_width):
                state.flush()
            removed.append(state.remove(int(state.costs().argmin())))
            if state.n_gone == len(state.units):
                state.flush()
        return removed

    return torch.tensor(in_precision(order, weight.device, name), device=weight.device)


class _Lazy:
    """H^-1 and W^T W of the remaining units, with pending low-rank corrections.

    Of removal i, with ``H^-1_SS = C C^T``: ``U_i = H^-1_:S C^-T`` and ``E_i = W_S C^-T``, so that
    ``H^-1 - U U^T`` and ``W - E U^T`` are the inverse and the weights after it. With
    ``R = W^T E - U E^T E / 2`` then ``W^T W - R U^T - U R^T``.
    """

    def __init__(
        self, inverse: Float[Tensor, "in in"], product: Float[Tensor, "in in"], unit_width: int, name: str
    ) -> None:
        self._inverse, self._product, self._width, self._name = inverse, product, unit_width, name
        self.units = list(range(inverse.shape[0] // unit_width))
        self._restart()

    def _restart(self) -> None:
        n, width = self._inverse.shape[0], self._width
        self.n_pending = self.n_gone = 0
        self._failed = torch.zeros((), dtype=torch.int32, device=self._inverse.device)
        self._u = self._inverse.new_empty(n, max(_LAZY, width))
        self._r = torch.empty_like(self._u)
        self._gone = torch.zeros(n // width, dtype=torch.bool, device=self._u.device)
        self._inverse_blocks = _diagonal_blocks(self._inverse, width)
        self._product_blocks = _diagonal_blocks(self._product, width)

    def costs(self) -> Float[Tensor, " left"]:
        """Cost of the removal of each unit; infinite for removed ones that are not yet flushed."""
        if self._width == 1:
            cost = (self._product_blocks / self._inverse_blocks).flatten()
        else:
            inverse = self._inverse_blocks.clone()
            inverse[self._gone] = torch.eye(self._width, dtype=inverse.dtype, device=inverse.device)
            cost = torch.linalg.solve(inverse, self._product_blocks).diagonal(dim1=1, dim2=2).sum(1)
        return cost.masked_fill(self._gone, torch.inf)

    def remove(self, position: int) -> int:
        """Remove the unit at this place; its number."""
        columns = slice(position * self._width, (position + 1) * self._width)
        u, r = self._u[:, : self.n_pending], self._r[:, : self.n_pending]
        root, failed = torch.linalg.cholesky_ex(self._inverse_blocks[position])
        self._failed += failed.abs()  # looked at in `flush`: a look waits for the device
        new_u = _over_root(self._inverse[:, columns] - u @ u[columns].T, root)
        energy = _over_root(_over_root(self._product_blocks[position], root).T, root)  # E^T E
        new_r = _over_root(self._product[:, columns] - r @ u[columns].T - u @ r[columns].T, root)
        new_r -= new_u @ energy / 2
        self._u[:, self.n_pending : self.n_pending + self._width] = new_u
        self._r[:, self.n_pending : self.n_pending + self._width] = new_r
        self.n_pending += self._width
        u_blocks, r_blocks = (x.reshape(-1, self._width, self._width) for x in (new_u, new_r))
        self._inverse_blocks -= _by_block(u_blocks, u_blocks)
        cross = _by_block(r_blocks, u_blocks)
        self._product_blocks -= cross + cross.mT
        self._gone[position] = True
        self.n_gone += 1
        return self.units[position]

    def flush(self) -> None:
        """Apply pending removals, and drop the removed units.

        Raises:
            NoFactorError: if one of them had no factor.
        """
        if self._failed:
            raise no_factor(self._name)
        left = ~self._gone
        rows = left.repeat_interleave(self._width).nonzero().flatten()
        u, r = self._u[rows, : self.n_pending], self._r[rows, : self.n_pending]
        self._inverse = self._inverse[rows[:, None], rows].addmm_(u, u.T, alpha=-1)
        self._product = self._product[rows[:, None], rows].addmm_(r, u.T, alpha=-1).addmm_(u, r.T, alpha=-1)
        self.units = [unit for unit, stays in zip(self.units, left.tolist(), strict=True) if stays]
        if self.units:
            self._restart()


def _over_root(
    x: Float[Tensor, "rows width"], root: Float[Tensor, "width width"]
) -> Float[Tensor, "rows width"]:
    """X C^-T, of the lower factor C."""
    solved: Tensor = torch.linalg.solve_triangular(root, x.T, upper=False)
    return solved.T


def _by_block(
    left: Float[Tensor, "units width width"], right: Float[Tensor, "units width width"]
) -> Float[Tensor, "units width width"]:
    """``left right^T`` of each unit; for channels a plain product, far faster than so many tiny matrices."""
    if left.shape[-1] == 1:
        return left * right
    return left @ right.mT


def _diagonal_blocks(matrix: Float[Tensor, "in in"], width: int) -> Float[Tensor, "units width width"]:
    n_units = matrix.shape[0] // width
    return matrix.reshape(n_units, width, n_units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def obs(evidence: Evidence) -> Float[Tensor, " units"]:
    """Place in the order of greedy optimal brain surgery, see `obs_order`, as a share of the units."""
    layout = evidence.layout
    order = obs_order(
        evidence.weight,
        evidence.seen.second_moment,
        layout.unit_width,
        dampening=evidence.dampening,
        name=layout.output.name,
    )
    return places(order)


def places(order: Int[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Place of each unit in an order of removal, as a share of the units."""
    score = torch.empty(len(order), device=order.device)
    score[order] = torch.arange(len(order), device=order.device).float()
    return (score + 0.5) / len(order)


def obs_update(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, "out _"]]:
    """The update of optimal brain surgery for all removed inputs at once.

    ``W' = W_K + W_R H_RK H_KK^-1`` with ``H = G + dampening`` (ZipLM, arXiv 2302.04089, eq. 3; the sum of its steps
    one unit at a time is the same; so is Numerical Pruning's compensation, arXiv 2412.12441). Unlike in
    `least_squares` the dampening draws the weights to their dense values: weights of inputs
    that are uncorrelated with all removed ones are unchanged.
    """
    assert inputs.second_moment is not None
    moment = dampened(inputs.second_moment, inputs.dampening)
    return leading_solve(moment, inputs.weight.double() @ moment, counts, inputs.name)
