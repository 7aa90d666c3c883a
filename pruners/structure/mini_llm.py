"""MINI-LLM: weight, activation and gradients estimated by forward passes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.structure.evidence import Evidence


def mini_llm(evidence: Evidence) -> Float[Tensor, " units"]:
    """Sum of ``|w| ||x|| |g|`` over the unit's columns of the output projection, g estimated by forward passes alone.

    [INFER] MINI-LLM (arXiv 2407.11681) is known by its abstract: a feature map's sensitivity, of weight magnitude,
    activation and a gradient by `zeroth_order.estimate_gradients`. The feature map of a unit is what it gives to
    the output projection, so the weights that see it are the ones that count.
    """
    gradient = evidence.gradient("forward", evidence.layout.output)
    return evidence.by_unit((evidence.weight * gradient).abs().sum(0) * evidence.seen.norm).sum(1)
