"""Linear algebra of second moments: dampening, Cholesky factors, least squares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics

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
    mean = second_moment.diagonal().mean()
    moment = second_moment.clone()
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
            upper = _inverse_factor(inputs, dampening * 10**attempt, precision)
            if upper is not None:
                return upper.float()
            if attempt == 0 and precision == torch.float32:
                _fall_back(name)
    raise no_factor(name)


def _inverse_factor(
    inputs: InputStatistics, dampening: float, precision: torch.dtype
) -> Float[Tensor, "in in"] | None:
    """The factor in a precision; None if there is none."""
    # Each matrix is freed once it is used: they are most of the memory of wide layers.
    assert inputs.gram is not None
    moment = inputs.gram.to(precision) / max(inputs.n_tokens, 1)
    damped = dampened(moment, dampening)
    del moment
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper: Tensor
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed else upper


def check_finite(moment: Float[Tensor, "in in"], name: str) -> None:
    """Raise a ValueError unless a second moment is finite."""
    if not torch.isfinite(moment).all():
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
