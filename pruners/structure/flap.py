"""FLAP: fluctuation of inputs as importance, standardised scores for allocation, means into biases."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.recipes.allocation.filling import wanted_weights
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence
from secateur.pruners.recipes.allocation.threshold import threshold
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.refit import RepairInputs


def flap(evidence: Evidence) -> Float[Tensor, " units"]:
    """Fluctuation: variance of the input times the column's squared norm (FLAP, arXiv 2312.11983, eq. 5, WIFV).

    Mean over a unit's columns. The released code squares it once more in attentions, and its running variance is
    biased; here it is the variance over all calibration tokens.
    """
    return evidence.by_unit(fluctuation(evidence)).mean(1)


def fluctuation(evidence: Evidence) -> Float[Tensor, " in"]:
    """FLAP's WIFV of each column of the output projection."""
    return evidence.weight.square().sum(0) * evidence.seen.variance


def standardised_flap(evidence: Evidence) -> Float[Tensor, " units"]:
    """FLAP's score by which units of all sub-layers compete (An et al. 2024, arXiv 2312.11983, eq. 6).

    The fluctuation of each column minus the sub-layer's mean, divided by its standard deviation; mean over a
    unit's columns. The released code squares the attention's fluctuations first; this does not, as the paper.
    A sub-layer whose columns are all equal scores 0.
    """
    columns = fluctuation(evidence)
    centred = columns - columns.mean()
    deviation = centred.square().mean().sqrt()
    return evidence.by_unit(centred / deviation.where(deviation > 0, 1.0)).mean(1)


def mean_bias(inputs: RepairInputs, counts: Sequence[int]) -> list[Float[Tensor, " out"]]:
    """Removed inputs are replaced by their means: for each count the addition to the bias.

    FLAP's compensation (An et al. 2024, arXiv 2312.11983): ``sum over removed j of W_:j E[x_j]``. A projection
    without bias gets one.
    """
    weighted = inputs.weight.double() * inputs.mean.double()
    return [weighted[:, count:].sum(1) for count in counts]


def allocation(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float) -> Ints:
    """One threshold for the standardised fluctuations, whatever metric ranks the units within their layer.

    FLAP's adaptive allocation (An et al. 2024, arXiv 2312.11983, eq. 6). A group counts for its parameters, as in the
    released code, where a head counts for 512/3 channels of LLaMA-7B.
    """
    return threshold(layers, evidence.flap, wanted_weights(layers, sparsity))
