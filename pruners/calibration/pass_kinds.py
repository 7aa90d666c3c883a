"""Statistics of the whole dense model with a pass of their own: registries beside `gradient_kinds.KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.fisher import moments_bytes, output_costs, output_moments, pass_bytes
from secateur.pruners.calibration.gradient_kinds import KINDS, Kind
from secateur.pruners.calibration.input_norms import input_norms, norm_bytes, window_norms
from secateur.pruners.calibration.token_damage import damage_bytes, damage_norms
from secateur.pruners.calibration.zeroth_order import estimate_bytes, estimate_gradients
from secateur.pruners.learned.maskllm import check as check_groups
from secateur.pruners.learned.maskllm import learned_masks, training_bytes
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.structure.bonsai import perturbation_bytes, perturbation_scores, round_scores
from secateur.pruners.structure.fairness import fairness_scores
from secateur.pruners.structure.relevance import relevances
from secateur.pruners.weights.d_pruner import regularised_bytes, regularised_importance

Collected = dict[str, Float[Tensor, "..."]]
"""By the projection's full name."""


@dataclass(frozen=True)
class PassKind:
    """A row of the registry.

    Args:
        collect: from the dense model and calibration windows to tensors by the projection's full name.
        work_bytes: memory for that beyond the model, for windows of so many tokens.
        n_bytes: a weight, where it is cached.
        backward: whether a backward pass is needed.
        trains: whether it trains, so that `collect` takes the keyword `state`, to continue from.
        check: raises a ValueError on a model that it can't be collected of.
    """

    collect: Callable[..., Collected]
    work_bytes: Callable[[Anatomy, int], int]
    n_bytes: int
    backward: bool = False
    trains: bool = False
    check: Callable[[Anatomy], None] = lambda anatomy: None


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
    # Mean over the windows of each input channel's norm in a window.
    "window_norms": PassKind(window_norms, norm_bytes, 0),
    # Norm of each input channel, tokens weighted by the damage that pruning does to what they predict.
    "damage_norms": PassKind(damage_norms, damage_bytes, 0),
    # Relevance of each input channel for the next token's logit; at output projections.
    "relevance": PassKind(relevances, pass_bytes, 0, backward=True),
    # Learned 2:4 masks, as scores.
    "maskllm": PassKind(learned_masks, training_bytes, 4, backward=True, trains=True, check=check_groups),
}


@dataclass(frozen=True)
class ContrastKind:
    """A statistic that a second calibration set is needed for.

    Args:
        of: the kind that it is, of the second set; None: of both sets.
        collect: of both sets: from the dense model, the windows and those of the second set.
        work_bytes, n_bytes, backward: as in `PassKind`.
    """

    of: Kind | None = None
    collect: Callable[[Anatomy, Tensor, Tensor], Collected] | None = None
    work_bytes: Callable[[Anatomy, int], int] = norm_bytes
    n_bytes: int = 0
    backward: bool = False


CONTRAST_KINDS: dict[Kind, ContrastKind] = {
    "contrast_rms": ContrastKind("rms", n_bytes=4, backward=True),
    "contrast_norms": ContrastKind(collect=lambda anatomy, tokens, contrast: input_norms(anatomy, contrast)),
    "contrast_window_norms": ContrastKind("window_norms"),
    # D-Pruner's importance, of the loss on the first set, regularised by the importance on the second.
    "regularised": ContrastKind(None, regularised_importance, regularised_bytes, 4, backward=True),
    # Effects of leaving out a unit on both sets; a score a unit, at output projections.
    "fairness": ContrastKind(None, fairness_scores, perturbation_bytes),
}


def trained(kinds: Iterable[Kind]) -> list[Kind]:
    """Kinds whose statistics are trained, out of these."""
    return [kind for kind in kinds if kind in PASS_KINDS and PASS_KINDS[kind].trains]


def n_bytes(kind: Kind) -> int:
    """Bytes a weight of a cached kind, in any registry."""
    return KINDS[kind].n_bytes if kind in KINDS else _with_pass(kind).n_bytes


def takes_backward(kind: Kind) -> bool:
    """True if the kind takes a backward pass."""
    return kind in KINDS or _with_pass(kind).backward


def _with_pass(kind: Kind) -> PassKind | ContrastKind:
    return PASS_KINDS[kind] if kind in PASS_KINDS else CONTRAST_KINDS[kind]
