"""Levels of a mixture: for each number of kept experts which ones, and their weights where others are merged in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.experts.evidence import ExpertEvidence
from secateur.pruners.models.layout import MixtureLayout
from secateur.pruners.models.mixture import Mixture
from secateur.spaces.methods import EXPERT_IMPORTANCES, EXPERT_REPAIRS

NOTHING = "none"


def counts_of(mixture: Mixture) -> list[int]:
    """Numbers of experts to which a mixture can be cut, descending."""
    return [
        n for n in range(mixture.n_experts - mixture.n_groups, 0, -mixture.n_groups) if n >= mixture.fewest
    ]


def chosen_experts(
    importance: str, evidence: ExpertEvidence, counts: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """The experts that stay, ascending, for each number of them; of equal ones those with the larger numbers.

    Raises:
        ValueError: if a score is not finite.
    """
    row = EXPERT_IMPORTANCES[importance]
    if row.scope == "block":
        return dict(zip(counts, row.function(evidence, counts), strict=True))
    order = finite_scores(importance, evidence).argsort(stable=True).flip(0).tolist()
    return {count: evidence.mixture.best(order, count) for count in counts}


def finite_scores(importance: str, evidence: ExpertEvidence) -> Float[Tensor, " experts"]:
    """Score of each expert, higher = keep, by an importance that has scores.

    Raises:
        ValueError: if one is not finite.
    """
    score: Tensor = EXPERT_IMPORTANCES[importance].function(evidence)
    if not torch.isfinite(score).all():
        raise ValueError(
            f"Expected finite scores, got NaN or infinity at {evidence.mixture.name}. Check the calibration text."
        )
    return score


def expert_levels(
    layout: MixtureLayout,
    importance: str,
    evidence: ExpertEvidence,
    repairs: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """Tensors by names that `expert_level` reads.

    Args:
        layout: of the mixture, whole.
        importance: a row of `EXPERT_IMPORTANCES`.
        evidence: of it.
        repairs: rows of `EXPERT_REPAIRS`, with the numbers of kept experts that they are made for.
    """
    counts = sorted({count for of in repairs.values() for count in of})
    chosen = chosen_experts(importance, evidence, counts)
    tensors = {}
    for repair, of in repairs.items():
        for count in of:
            kept, weights = EXPERT_REPAIRS[repair].function(evidence, chosen[count])
            stem = _stem(layout, repair, count)
            tensors[f"{stem}.kept"] = torch.tensor(kept)
            tensors |= {f"{stem}.{name}": value for name, value in weights.items()}
    return tensors


def expert_level(
    layout: MixtureLayout, tensors: Mapping[str, Tensor], n_kept: int, repair: str
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """The kept experts of a level, and weights that change, by their names among the experts.

    Raises:
        ValueError: if it was not prepared.
    """
    stem = _stem(layout, repair if repair in EXPERT_REPAIRS else NOTHING, n_kept)
    if f"{stem}.kept" not in tensors:
        raise ValueError(
            f"Expected a level whose repair {repair!r} was prepared, got {n_kept} of {layout.n_units} experts [at "
            f"{layout.name}]. Add it to the levels."
        )
    kept = tuple(tensors[f"{stem}.kept"].tolist())
    names = (name for name in tensors if name.startswith(f"{stem}.") and name != f"{stem}.kept")
    return kept, {name.removeprefix(f"{stem}."): tensors[name] for name in names}


def _stem(layout: MixtureLayout, repair: str, count: int) -> str:
    return f"{layout.mixture.name}.experts.{repair}.{count}"
