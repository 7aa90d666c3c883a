"""NIRVANA's importance: first-order effect on the peaks of the logits."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.structure.evidence import Evidence


def nirvana(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``|w df/dw|`` over all weights of the unit, f the mean over windows of the logits' peaks.

    NIRVANA (arXiv 2509.14230): f is the mean over vocabulary and windows of the largest logit over a window's
    positions, so that no labels are needed. Its split of the budget between attentions and MLPs is no part of this.
    """
    return evidence.weight_sums(lambda x: (x.weight.float() * evidence.gradient("logits", x)).abs())
