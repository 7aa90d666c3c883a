"""Linear algebra of second moments: dampening, Cholesky factors, least squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics

RIDGE = 1e-6
"""In place of a pseudo-inverse: added to the diagonal of a second moment, as a fraction of its mean."""


def dampened(second_moment: Float[Tensor, "in in"], dampening: float) -> Float[Tensor, "in in"]:
    """Second moment with a fraction of its mean diagonal added to the diagonal; of 1 where all inputs were zero."""
    mean = second_moment.diagonal().mean()
    moment = second_moment.clone()
    moment.diagonal().add_(dampening * torch.where(mean > 0, mean, 1.0))
    return moment


def factor(moment: Float[Tensor, "in in"], name: str) -> Float[Tensor, "in in"]:
    """Lower Cholesky factor of a second moment.

    Raises:
        ValueError: if there is none, or it is not finite.
    """
    check_finite(moment, name)
    return lower_factor(moment, name)


def lower_factor(moment: Float[Tensor, "in in"], name: str) -> Float[Tensor, "in in"]:
    """Lower Cholesky factor of a matrix known to be finite.

    Raises:
        ValueError: if there is none.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        raise ValueError(f"Expected inputs that can be inverted, got none at {name}. Raise `dampening`.")
    return lower


def inverse_factor(inputs: InputStatistics, dampening: float, name: str) -> Float[Tensor, "in in"]:
    """Upper Cholesky factor U of the inverse of the dampened second moment, ``U.T @ U = H^-1``.

    Where fp32 finds the matrix not positive definite the damping is raised tenfold, at most five times.

    Raises:
        ValueError: if the moments are not finite.
    """
    assert inputs.gram is not None
    for attempt in range(
        6
    ):  # each matrix is freed once it is used: they are most of the memory of wide layers
        moment = inputs.gram / max(inputs.n_tokens, 1)
        if attempt == 0:
            check_finite(moment, name)
        damped = dampened(moment, dampening * 10**attempt)
        del moment
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        del inverse
        if not failed:
            return upper
    raise ValueError(f"Expected inputs that can be inverted, got none at {name}. Raise `dampening`.")


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
    """``target_:K (moment_KK)^-1`` for each K = the first `count` inputs.

    One factor serves all: that of a leading part is the leading part of the factor.
    """
    lower = factor(moment, name)
    return [torch.cholesky_solve(target[:, :count].T, lower[:count, :count]).T for count in counts]
