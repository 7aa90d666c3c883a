"""Mini-GPTs: contextual pruning by the mean size of activations on a domain."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.structure.evidence import Evidence


def mini_gpts(evidence: Evidence) -> Float[Tensor, " units"]:
    """Mean absolute output of the unit over the tokens of the domain, the calibration text.

    Mini-GPTs (Valicenti et al. 2023, arXiv 2312.12682), which prunes every neuron whose mean is below one threshold:
    with the rule ``global``, as the recipe `mini_gpts` has it. Differences: inputs and outputs of single projections,
    and rows of the embedding by the frequency of their token, are no units here; those are KV groups and channels of
    MLPs, with all of their weights. It fine-tunes on the domain afterwards: `secateur recover` does.
    """
    return evidence.by_unit(evidence.seen.mean_abs.float()).mean(1)
