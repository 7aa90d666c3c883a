"""How important the units of a sub-layer are: plain functions to a score a unit, higher = keep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.structure.cfsp import cfsp
from secateur.pruners.structure.evidence import Evidence, Score
from secateur.pruners.structure.gradient_scores import (
    bonsai,
    first_order,
    mini_llm,
    mixed_order,
    nirvana,
    saap,
    second_order,
    taylor,
    vector_order,
)
from secateur.pruners.structure.obs import obs_order
from secateur.pruners.structure.output_scores import greedy_output, llm_bip, newton
from secateur.pruners.structure.refit import Needs
from secateur.spaces.names import nearest


def wanda_sp(evidence: Evidence) -> Float[Tensor, " units"]:
    """Mean of ``|W_ij| ||x_j||`` over a column, and over a unit's columns.

    Wanda (arXiv 2306.11695) for structures, as the released code of FLAP (arXiv 2312.11983) has it.
    """
    return evidence.by_unit(evidence.weight.abs().mean(0) * evidence.seen.norm).mean(1)


def flap(evidence: Evidence) -> Float[Tensor, " units"]:
    """Fluctuation: variance of the input times the column's squared norm (FLAP, arXiv 2312.11983, eq. 5, WIFV).

    Mean over a unit's columns. The released code squares it once more in attentions, and its running variance is
    biased; here it is the variance over all calibration tokens.
    """
    return evidence.by_unit(fluctuation(evidence)).mean(1)


def fluctuation(evidence: Evidence) -> Float[Tensor, " in"]:
    """FLAP's WIFV of each column of the output projection."""
    return evidence.weight.square().sum(0) * evidence.seen.variance


def activation(evidence: Evidence) -> Float[Tensor, " units"]:
    """Size of the input: l2 norm over windows of the mean over tokens of ``|x_j|``, l2 over a unit's columns.

    Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2, mean and l2 as aggregates).
    """
    return evidence.by_unit(evidence.seen.window_squares).sum(1).sqrt()


def magnitude(evidence: Evidence) -> Float[Tensor, " units"]:
    """l2 norm of the unit's columns of the output projection (Li et al. 2017, arXiv 1608.08710, for columns)."""
    return evidence.by_unit(evidence.weight.square().sum(0)).sum(1).sqrt()


def weight_power(evidence: Evidence, power: float) -> Float[Tensor, " units"]:
    """Sum of ``|w|^power`` over all weights of the unit: LLM-Pruner's l1 and l2 (Ma et al. 2023, arXiv 2305.11627)."""
    return evidence.weight_sums(lambda x: x.weight.float().abs() ** power)


def obs(evidence: Evidence) -> Float[Tensor, " units"]:
    """Place in the order of greedy optimal brain surgery, see `obs_order`, as a share of the units."""
    layout = evidence.layout
    order = obs_order(
        evidence.weight,
        evidence.seen.second_moment,
        layout.unit_width,
        damp=evidence.damp,
        name=layout.output.name,
    )
    score = torch.empty(layout.n_units, device=order.device)
    score[order] = torch.arange(layout.n_units, device=order.device).float()
    return (score + 0.5) / layout.n_units


@dataclass(frozen=True)
class ImportanceRow:
    """A row of the registry.

    Args:
        function: the score.
        needs: statistics of inputs that must be collected first.
        paper: address.
        summary: one line for people.
        gradients: kinds of them that must be collected first, of `KINDS` or `FORWARD_KINDS`.
    """

    function: Score
    needs: Needs
    paper: str
    summary: str
    gradients: tuple[Kind, ...] = ()


LLM_PRUNER = "https://arxiv.org/abs/2305.11627"

IMPORTANCES: dict[str, ImportanceRow] = {
    "wanda_sp": ImportanceRow(
        wanda_sp, "moments", "https://arxiv.org/abs/2312.11983", "|w| times input norm, mean over a column"
    ),
    "flap": ImportanceRow(
        flap, "moments", "https://arxiv.org/abs/2312.11983", "input variance times squared column norm"
    ),
    "taylor": ImportanceRow(
        taylor,
        "nothing",
        "https://arxiv.org/abs/2305.11627",
        "first-order effect, root mean square over windows",
        ("rms",),
    ),
    "activation": ImportanceRow(
        activation, "moments", "https://arxiv.org/abs/2407.14679", "size of the input alone"
    ),
    "magnitude": ImportanceRow(
        magnitude, "nothing", "https://arxiv.org/abs/1608.08710", "norm of the output columns alone"
    ),
    "obs": ImportanceRow(
        obs, "gram", "https://arxiv.org/abs/2302.04089", "greedy optimal brain surgery on the output columns"
    ),
    "llm_pruner_first": ImportanceRow(
        first_order, "nothing", LLM_PRUNER, "LLM-Pruner: |w g|, element-wise", ("mean",)
    ),
    "llm_pruner_vector": ImportanceRow(
        vector_order, "nothing", LLM_PRUNER, "LLM-Pruner: |sum of w g|, vector-wise", ("mean",)
    ),
    "llm_pruner_second": ImportanceRow(
        second_order, "nothing", LLM_PRUNER, "LLM-Pruner: w^2 times the Fisher diagonal", ("rms",)
    ),
    "llm_pruner_mixed": ImportanceRow(
        mixed_order, "nothing", LLM_PRUNER, "LLM-Pruner: first minus half the second order", ("rms", "mean")
    ),
    "llm_pruner_l1": ImportanceRow(
        partial(weight_power, power=1.0),
        "nothing",
        LLM_PRUNER,
        "LLM-Pruner: sum of |w| of all that is coupled",
    ),
    "llm_pruner_l2": ImportanceRow(
        partial(weight_power, power=2.0),
        "nothing",
        LLM_PRUNER,
        "LLM-Pruner: sum of w^2 of all that is coupled",
    ),
    "nirvana": ImportanceRow(
        nirvana,
        "nothing",
        "https://arxiv.org/abs/2509.14230",
        "first-order effect on the logits' peaks, no labels",
        ("logits",),
    ),
    "saap": ImportanceRow(
        saap,
        "nothing",
        "https://arxiv.org/abs/2412.15127",
        "coarse and fine first-order scores, weighted by their certainty",
        ("rms", "mean", "sums"),
    ),
    "mini_llm": ImportanceRow(
        mini_llm,
        "moments",
        "https://arxiv.org/abs/2407.11681",
        "|w g| times input norm, g estimated by forward passes alone",
        ("forward",),
    ),
    "bonsai": ImportanceRow(
        bonsai,
        "nothing",
        "https://arxiv.org/abs/2402.05406",
        "effect on the loss of leaving the unit out, by regression over random masks",
        ("perturbed",),
    ),
    "cfsp": ImportanceRow(
        cfsp, "moments", "https://arxiv.org/abs/2409.13199", "share of the weights times input norm"
    ),
    "llm_bip": ImportanceRow(
        llm_bip, "gram", "https://arxiv.org/abs/2412.06419", "size of what the unit adds to the output"
    ),
    "numerical": ImportanceRow(
        newton,
        "gram",
        "https://arxiv.org/abs/2412.12441",
        "Numerical Pruning: relaxed mask by Newton's method",
    ),
    "greedy_output": ImportanceRow(
        greedy_output,
        "gram",
        "https://arxiv.org/abs/2407.19126",
        "channels by the error after a re-fit, groups by similarity",
    ),
}


def importance_order(importance: str, evidence: Evidence) -> Int[Tensor, " units"]:
    """Units from the most important on; of equal ones the one with the larger index first.

    Raises:
        ValueError: if a score is not finite.
    """
    score = IMPORTANCES[importance].function(evidence)
    if not torch.isfinite(score).all():
        raise ValueError(
            f"Expected finite scores, got NaN or infinity at {evidence.layout.name}. Check the calibration text."
        )
    return score.argsort(stable=True).flip(0)


def check_importance(name: str, key: str = "importance") -> None:
    """Raise a ValueError, which names the setting, unless it is known."""
    if name not in IMPORTANCES:
        raise ValueError(f"Expected a known `{key}`, got {name!r}.{nearest(name, IMPORTANCES)}")
