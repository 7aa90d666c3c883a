"""Linear algebra of second moments: dampening, Cholesky factors, least squares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics

_TILE = 1024
RIDGE = 1e-6
"""In place of a pseudo-inverse: added to the diagonal of a second moment, as a fraction of its mean."""


T = TypeVar("T")
_log = logging.getLogger(__name__)


class NoFactorError(ValueError):
    """A matrix without a Cholesky factor in the precision that it is computed in."""


def in_precision(solve: Callable[[torch.dtype], T], device: torch.device, name: str) -> T:
    """Result of a computation with Cholesky factors: in fp64 on a CPU, elsewhere in fp32, where fp64 is far slower.

    Where fp32 finds no factor it is computed again in fp64, and a line in the log says so.

    Args:
        solve: computes it in a precision.
        device: of its matrices.
        name: the layer, for the log.

    Raises:
        NoFactorError: as `solve` does in fp64.
    """
    if device.type == "cpu":
        return solve(torch.float64)
    try:
        return solve(torch.float32)
    except NoFactorError:
        _fall_back(name)
        return solve(torch.float64)


def _fall_back(name: str) -> None:
    _log.warning("fp32 finds no Cholesky factor of the inputs at %s: computed in fp64", name)


def dampened(second_moment: Float[Tensor, "in in"], dampening: float) -> Float[Tensor, "in in"]:
    """Second moment with a fraction of its mean diagonal added to the diagonal; of 1 where all inputs were zero."""
    return _damp(second_moment.clone(), dampening)


def _damp(moment: Float[Tensor, "in in"], dampening: float) -> Float[Tensor, "in in"]:
    """`dampened`, in place."""
    mean = moment.diagonal().mean()
    moment.diagonal().add_(dampening * torch.where(mean > 0, mean, 1.0))
    return moment


def factor(moment: Float[Tensor, "in in"], name: str) -> Float[Tensor, "in in"]:
    """Lower Cholesky factor of a second moment.

    Raises:
        NoFactorError: if there is none.
        ValueError: if the moment is not finite.
    """
    check_finite(moment, name)
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        raise no_factor(name)
    return lower


def no_factor(name: str) -> NoFactorError:
    """The error of a layer whose inputs can't be inverted."""
    return NoFactorError(f"Expected inputs that can be inverted, got none at {name}. Raise `dampening`.")


def stored_in(weight: Float[Tensor, "*levels out in"], dtype: torch.dtype) -> Float[Tensor, "*levels out in"]:
    """Weight in a dtype; the same tensor if it has it.

    Where it is converted each row lies in one run. With columns in one run a product takes some forty times as long on
    a CPU without instructions for half precision.
    """
    if weight.dtype == dtype:
        return weight
    return weight.to(dtype, memory_format=torch.contiguous_format)


def inverse_factor(inputs: InputStatistics, dampening: float, name: str) -> Float[Tensor, "in in"]:
    """Upper Cholesky factor U of the inverse of the dampened second moment, ``U.T @ U = H^-1``.

    Where fp32 finds the matrix not positive definite it is computed in fp64, and a line in the log says so; where that
    fails too the damping is raised tenfold, at most five times.

    Returns:
        The factor in fp32.

    Raises:
        ValueError: if the moments are not finite.
    """
    assert inputs.gram is not None
    check_finite(inputs.gram, name)
    for attempt in range(6):
        for precision in (torch.float32, torch.float64):
            moment = inputs.gram.to(precision, copy=True).div_(max(inputs.n_tokens, 1))
            upper = _inverse_factor(_damp(moment, dampening * 10**attempt))
            if upper is not None:
                return upper.float()
            if attempt == 0 and precision == torch.float32:
                _fall_back(name)
    raise no_factor(name)


def _inverse_factor(moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"] | None:
    """Upper Cholesky factor of the inverse; None if there is none. On a CPU all in the memory of the moment.

    These matrices are most of the memory that wide layers take.
    """
    mirror_lower(moment)
    matrix = moment.mT  # columns are contiguous, as LAPACK has them
    in_place = matrix.device.type == "cpu"
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    matrix, failed = torch.linalg.cholesky_ex(matrix, out=(matrix, info) if in_place else None)
    if failed:
        return None
    matrix = torch.cholesky_inverse(matrix, out=matrix if in_place else None)
    matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, info) if in_place else None)
    return None if failed else matrix


def mirror_lower(matrix: Float[Tensor, "n n"]) -> None:
    """Write the lower triangle over the upper one, tile by tile, in place."""
    for row in range(0, len(matrix), _TILE):
        for column in range(0, row, _TILE):
            tile = matrix[row : row + _TILE, column : column + _TILE]
            matrix[column : column + _TILE, row : row + _TILE] = tile.mT
        middle = matrix[row : row + _TILE, row : row + _TILE]
        middle.copy_(middle.tril() + middle.tril(-1).mT)


def check_finite(moment: Float[Tensor, "in in"], name: str) -> None:
    """Raise a ValueError unless a second moment is finite."""
    rows = max(1, (1 << 22) // len(moment))  # its answers and absolute values take memory, too
    if not all(torch.isfinite(part).all() for part in moment.split(rows)):
        raise ValueError(
            f"Expected finite inputs, got NaN or infinity at {name}. Check the calibration text."
        )


def input_factor(inputs: Float[Tensor, "tokens in"], name: str) -> Float[Tensor, "in in"]:
    """Cholesky factor of the inputs' second moment, dampened by `RIDGE`, in fp64; errors as of `factor`."""
    return factor(dampened((inputs.T @ inputs).double() / len(inputs), RIDGE), name)


def least_squares(
    inputs: Float[Tensor, "tokens in"], outputs: Float[Tensor, "tokens out"], lower: Float[Tensor, "in in"]
) -> Float[Tensor, "out in"]:
    """Weight that fits the outputs best, in fp64; `lower` is the `input_factor` of the inputs."""
    return torch.cholesky_solve((inputs.T @ outputs).double() / len(inputs), lower).T


def leading_solve(
    moment: Float[Tensor, "in in"], target: Float[Tensor, "out in"], counts: Sequence[int], name: str
) -> list[Tensor]:
    """``target_:K (moment_KK)^-1`` for each K = the first `count` inputs, in the precision of `in_precision`.

    One factor serves all: that of a leading part is the leading part of the factor.
    """

    def solve(precision: torch.dtype) -> list[Tensor]:
        lower, right = factor(moment.to(precision), name), target.to(precision).T
        solved = [torch.cholesky_solve(right[:count], lower[:count, :count]) for count in counts]
        return [x.T.to(target.dtype) for x in solved]

    return in_precision(solve, moment.device, name)
