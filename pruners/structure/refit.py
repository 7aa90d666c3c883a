"""Closed-form repair of an output projection whose inputs were cut: a registry of plain functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.linalg import dampened, factor
from secateur.pruners.weights.admm import Fit

Needs = Literal["nothing", "moments", "gram"]


@dataclass(frozen=True)
class RepairInputs:
    """What a repair works with; inputs stand in the order of importance, those that stay first.

    Args:
        weight: of the output projection.
        mean: of its inputs over the calibration tokens.
        second_moment: of its inputs, a token; None unless the registry says that it is needed.
        damp: added to the second moment's diagonal, as a fraction of its mean, > 0.
        name: the layer, for errors.
    """

    weight: Float[Tensor, "out in"]
    mean: Float[Tensor, " in"]
    second_moment: Float[Tensor, "in in"] | None
    damp: float
    name: str


Repair = Callable[[RepairInputs, Sequence[int]], list[Tensor]]


def nothing(inputs: RepairInputs, counts: Sequence[int]) -> list[Tensor]:
    """No repair: the first columns are what they were."""
    return []


def mean_bias(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, " out"]]:
    """What goes is replaced by its mean: for each count, what to add to the bias.

    FLAP's compensation (An et al. 2024, arXiv 2312.11983): ``sum over removed j of W_:j E[x_j]``. A projection
    without bias gets one.
    """
    weighted = inputs.weight.double() * inputs.mean.double()
    return [weighted[:, count:].sum(1) for count in counts]


def least_squares(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, "out _"]]:
    """Ridge regression of the dense output on the inputs that stay.

    ``W' = W G_:K (G_KK + damp)^-1``: the dampening draws the weights to zero. Those that stay are refit even where
    little goes. The core of K-prune (arXiv 2308.03449) and the re-fit of Greedy Output Approximation (arXiv
    2407.19126). K-prune solves it undampened, between the inputs in the already pruned model and what is missing
    there to the dense one's stream, see `kprune.reconstructed`; here inputs and targets are those of one model.
    """
    assert inputs.second_moment is not None
    target = inputs.weight.double() @ inputs.second_moment
    return _solve(dampened(inputs.second_moment, inputs.damp), target, counts, inputs.name)


def obs_update(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, "out _"]]:
    """The update of optimal brain surgery for all that goes at once.

    ``W' = W_K + W_R H_RK H_KK^-1`` with ``H = G + damp`` (ZipLM, arXiv 2302.04089, eq. 3; the sum of its steps
    one unit at a time is the same; so is Numerical Pruning's compensation, arXiv 2412.12441). Unlike in
    `least_squares` the dampening draws the weights to their dense values: what is uncorrelated with all that goes
    stays as it was.
    """
    assert inputs.second_moment is not None
    moment = dampened(inputs.second_moment, inputs.damp)
    return _solve(moment, inputs.weight.double() @ moment, counts, inputs.name)


def interpolated(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, "out _"]]:
    """What goes is replaced by its best affine prediction from what stays.

    [INFER] LIAR (arXiv 2407.13331) is known by its abstract: kept weights and biases are interpolated linearly, by
    least squares. Here ``W' = W_K + W_R Q``, ``b' = b + W_R (m_R - Q m_K)`` with ``Q = C_RK (C_KK + damp)^-1`` and the
    covariance C = G - m m^T: `obs_update` of centred inputs with `mean_bias`'s of what is left. With a bias in play
    that is the optimum; second moments in the place of covariances would fit the weights to the means, too.

    Returns:
        For each count the new columns of the weight, and in one more column what to add to the bias.
    """
    assert inputs.second_moment is not None
    mean, weight = inputs.mean.double(), inputs.weight.double()
    moment = dampened(inputs.second_moment - torch.outer(mean, mean), inputs.damp)
    fitted = _solve(moment, weight @ moment, counts, inputs.name)
    biases = [weight @ mean - new @ mean[: new.shape[1]] for new in fitted]
    return [torch.cat([new, bias[:, None]], 1) for new, bias in zip(fitted, biases, strict=True)]


def alternating(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, "out _"]]:
    """The weights that stay, fitted by 20 steps of ADMM, see `admm.Fit`.

    Fast and Optimal Weight Update (Boza 2024, arXiv 2401.02938) with the same columns kept in each row. The steps
    converge to `obs_update` with a dampening in proportion to each input's own second moment; as an optimum is
    known in closed form, this one is for comparison.
    """
    assert inputs.second_moment is not None
    fit = Fit(inputs.weight, inputs.second_moment, damp=inputs.damp, name=inputs.name)
    columns = torch.arange(inputs.weight.shape[1], device=inputs.weight.device)
    return [fit.masked(columns[None] < count)[:, :count] for count in counts]


def _solve(
    moment: Float[Tensor, "in in"], target: Float[Tensor, "out in"], counts: Sequence[int], name: str
) -> list[Tensor]:
    """``target_:K (moment_KK)^-1`` for each K = the first `count` inputs.

    One factor serves all: that of a leading part is the leading part of the factor.
    """
    lower = factor(moment, name)
    return [torch.cholesky_solve(target[:, :count].T, lower[:count, :count]).T for count in counts]


@dataclass(frozen=True)
class RepairRow:
    """A row of the registry.

    Args:
        function: from inputs and counts of kept columns to what it gives for each count.
        gives: new columns of the weight, an addition to the bias, both (it is the last column), or nothing.
        needs: statistics that must be collected first.
        summary: one line for people.
        paper: address.
    """

    function: Repair
    gives: Literal["nothing", "weight", "bias", "both"]
    needs: Needs
    summary: str
    paper: str


REPAIRS: dict[str, RepairRow] = {
    "none": RepairRow(nothing, "nothing", "nothing", "what stays is as it was", ""),
    "bias": RepairRow(
        mean_bias, "bias", "moments", "what goes is replaced by its mean", "https://arxiv.org/abs/2312.11983"
    ),
    "refit": RepairRow(
        least_squares,
        "weight",
        "gram",
        "ridge regression of the dense output on what stays",
        "https://arxiv.org/abs/2308.03449",
    ),
    "obs": RepairRow(
        obs_update,
        "weight",
        "gram",
        "optimal brain surgery: least change of the weights too",
        "https://arxiv.org/abs/2302.04089",
    ),
    "liar": RepairRow(
        interpolated,
        "both",
        "gram",
        "what goes is replaced by its prediction from what stays, with a bias",
        "https://arxiv.org/abs/2407.13331",
    ),
    "admm": RepairRow(
        alternating,
        "weight",
        "gram",
        "what stays is fitted by alternating directions",
        "https://arxiv.org/abs/2401.02938",
    ),
}
