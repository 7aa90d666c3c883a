"""Importances of experts by sums over the calibration tokens that are routed to them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.experts.evidence import ExpertEvidence


def reap(evidence: ExpertEvidence) -> Float[Tensor, " experts"]:
    """Mean over an expert's tokens of the router's weight times the l2 norm of the expert's output.

    REAP (Lasby et al. 2025, arXiv 2510.13999, eq. 9). Weights are those with which the model adds the outputs up: its
    released code (https://github.com/CerebrasResearch/reap) takes the softmax over all experts, and those of a
    token's experts add up to one on request alone. An expert without tokens scores 0.
    """
    return evidence.gated_norms / evidence.n_routed.clamp_min(1.0)


def frequency(evidence: ExpertEvidence) -> Float[Tensor, " experts"]:
    """Share of the tokens that are routed to an expert."""
    return evidence.n_routed / len(evidence.hidden)


def mean_gate(evidence: ExpertEvidence) -> Float[Tensor, " experts"]:
    """Mean over all tokens of the weight with which they are routed to an expert, 0 where they aren't.

    [INFER] The soft counting of SEER-MoE (Muzio et al. 2024, arXiv 2404.05089), known by its abstract.
    """
    return evidence.gates / len(evidence.hidden)


def easy_ep(evidence: ExpertEvidence) -> Float[Tensor, " experts"]:
    """Sum over the tokens of weight times output norm, each token counted by how far all routed experts turn it.

    EASY-EP (Dong et al. 2025, arXiv 2504.06792). How far a token is turned is one minus the cosine between the hidden
    state before the mixture and the same plus the routed experts' outputs, shared experts in neither, as in its
    released code (https://github.com/RUCAIBox/EASYEP). Difference: there the longest 25 answers of a model to tasks
    of one domain are scored, here the calibration text. The state before is the block's output minus the mixture's,
    which is not exact where a family scales or normalises what it adds.
    """
    return evidence.contributions
