"""CFSP's importance of channels, as in the text of its paper."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.models.placement import Placement
from secateur.pruners.structure.evidence import Evidence


def cfsp(evidence: Evidence) -> Float[Tensor, " units"]:
    """A unit's share of the weights, times the size of its input.

    CFSP (Wang et al. 2025, arXiv 2409.13199, fine-grained importance) adds relative weights of gate, up and down,
    and multiplies by the activation's norm. In the released code each weight is divided by the sum over its own
    channel, so that the mean over the channel is the same for all of them: what is left is the norm alone.

    [INFER] Here a weight is divided by the sum over all channels for the same hidden feature; weights of down count
    with the norm of their inputs. Groups, which the paper does not prune, are scored alike, with the mean norm of
    their columns.
    """
    norms = evidence.by_unit(evidence.seen.norm.float()).mean(1)
    return evidence.unit_sums(lambda placement: _shares(evidence, placement)) * norms


def _shares(evidence: Evidence, placement: Placement) -> Float[Tensor, " axis"]:
    """Mean over the hidden features of each line's share in the sum over all lines."""
    absolute = placement.linear.weight.float().abs()
    if placement.axis == 1:
        absolute = absolute * evidence.seen.norm.float()
    total = absolute.sum(placement.axis, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (absolute / total).mean(1 - placement.axis)
