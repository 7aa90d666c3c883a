"""Statistics of the whole dense model with a pass of their own: a registry beside `gradient_kinds.KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.fisher import moments_bytes, output_costs, output_moments, pass_bytes
from secateur.pruners.calibration.gradient_kinds import KINDS, Kind
from secateur.pruners.calibration.zeroth_order import estimate_bytes, estimate_gradients
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.structure.bonsai import perturbation_bytes, perturbation_scores, round_scores


@dataclass(frozen=True)
class PassKind:
    """A row of the registry.

    Args:
        collect: from the dense model and calibration windows to tensors by the projection's full name.
        work_bytes: memory for that beyond the model, for windows of so many tokens.
        n_bytes: a weight, where it is cached.
        backward: whether a backward pass is needed.
    """

    collect: Callable[[Anatomy, Int[Tensor, "windows length"]], dict[str, Float[Tensor, "..."]]]
    work_bytes: Callable[[Anatomy, int], int]
    n_bytes: int
    backward: bool = False


PASS_KINDS: dict[Kind, PassKind] = {
    # An estimate of the mean over the windows, signed.
    "forward": PassKind(estimate_gradients, estimate_bytes, 4),
    # Effect of leaving out a unit, by regression over random masks; at output projections.
    "perturbed": PassKind(perturbation_scores, perturbation_bytes, 0),
    "perturbed_round": PassKind(round_scores, perturbation_bytes, 0),
    # Curvature of the loss in each output, the others free to follow; a vector.
    "fisher": PassKind(output_costs, pass_bytes, 0, backward=True),
    # Second moment of the gradients of the outputs, of drawn labels; at output projections.
    "fisher_outputs": PassKind(output_moments, moments_bytes, 1, backward=True),
}


def n_bytes(kind: Kind) -> int:
    """Bytes a weight of a cached kind, in either registry."""
    return (KINDS[kind] if kind in KINDS else PASS_KINDS[kind]).n_bytes
