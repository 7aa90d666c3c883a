"""How much each sub-layer and block matters next to those of the whole model: what known allocations start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.importance import fluctuation


@dataclass(frozen=True)
class AllocationScores:
    """Scores of the dense model on the calibration tokens that compare over all its blocks; higher = keep.

    Args:
        attention: for each block of each KV group, by number: standardised fluctuation, see `standardised_flap`.
        mlp: likewise of each channel.
        influence: of each block, see `stream.BlockStatistics`; ShortGPT drops those of least influence first.
        blocks: further scores of each block, by name, see `depth.DEPTH`.
    """

    attention: tuple[tuple[float, ...], ...]
    mlp: tuple[tuple[float, ...], ...]
    influence: tuple[float, ...]
    blocks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def standardised_flap(evidence: Evidence) -> Float[Tensor, " units"]:
    """FLAP's score with which units of all sub-layers compete (An et al. 2024, arXiv 2312.11983, eq. 6).

    The fluctuation of each column minus the sub-layer's mean, divided by its standard deviation; mean over a
    unit's columns. The released code squares the attention's fluctuations first; this does not, as the paper.
    A sub-layer whose columns are all equal scores 0.
    """
    columns = fluctuation(evidence)
    centred = columns - columns.mean()
    deviation = centred.square().mean().sqrt()
    return evidence.by_unit(centred / deviation.where(deviation > 0, 1.0)).mean(1)
