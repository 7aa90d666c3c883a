"""Closed-form repairs of an output projection whose inputs were cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.linalg import dampened, leading_solve
from secateur.pruners.weights.admm import Fit


@dataclass(frozen=True)
class RepairInputs:
    """Inputs of a repair, in the order of importance, the kept ones first.

    Args:
        weight: of the output projection.
        mean: of its inputs over the calibration tokens.
        second_moment: of its inputs, a token; None unless the repair needs it.
        dampening: added to the second moment's diagonal, as a fraction of its mean, > 0.
        name: the layer, for errors.
    """

    weight: Float[Tensor, "out in"]
    mean: Float[Tensor, " in"]
    second_moment: Float[Tensor, "in in"] | None
    dampening: float
    name: str


def nothing(inputs: RepairInputs, counts: Sequence[int]) -> list[Tensor]:
    """No repair: the kept columns are unchanged."""
    return []


def least_squares(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, "out _"]]:
    """Ridge regression of the dense output on the kept inputs.

    ``W' = W G_:K (G_KK + dampening)^-1``: the dampening draws the weights to zero. Kept weights are refit even where
    little is removed. The core of K-prune (arXiv 2308.03449) and the re-fit of Greedy Output Approximation (arXiv
    2407.19126). K-prune solves it undampened, between the inputs in the already pruned model and what is missing
    there to the dense one's stream, see `kprune.reconstructed`; here inputs and targets are those of one model.
    """
    assert inputs.second_moment is not None
    target = inputs.weight.double() @ inputs.second_moment
    return leading_solve(dampened(inputs.second_moment, inputs.dampening), target, counts, inputs.name)


def alternating(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, "out _"]]:
    """The kept weights, fitted by 20 steps of ADMM, see `admm.Fit`.

    Fast and Optimal Weight Update (Boza 2024, arXiv 2401.02938) with the same columns kept in each row. The steps
    converge to `obs_update` with a dampening in proportion to each input's own second moment; as an optimum is
    known in closed form, this one is for comparison.
    """
    assert inputs.second_moment is not None
    fit = Fit(inputs.weight, inputs.second_moment, dampening=inputs.dampening, name=inputs.name)
    columns = torch.arange(inputs.weight.shape[1], device=inputs.weight.device)
    return [fit.masked(columns[None] < count)[:, :count] for count in counts]
