"""Importance metrics: plain functions from a weight and its inputs' statistics to a score, higher = keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.masks import Comparison
from secateur.spaces.formulas.grammar import parse
from secateur.spaces.formulas.known import KNOWN
from secateur.spaces.formulas.tree import Tree

Score = Callable[
    [Float[Tensor, "out in"], InputStatistics | None, torch.Generator],
    Float[Tensor, "out in"],
]


def random(
    weight: Float[Tensor, "out in"], inputs: InputStatistics | None, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """Uniform noise: the baseline below which no metric may fall. Seeded by the study's seed and the layer."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def magnitude(
    weight: Float[Tensor, "out in"], inputs: InputStatistics | None, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """``|w|``, compared over the whole layer (Han et al. 2015, arXiv 1506.02626)."""
    return weight.abs().float()


def wanda(
    weight: Float[Tensor, "out in"], inputs: InputStatistics | None, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """``|w| * ||x||``, compared per output (Sun et al. 2023, arXiv 2306.11695, eq. 1).

    The norm is the root mean square over tokens: a constant factor that no comparison sees.
    """
    return weight.abs().float() * _needed(inputs).norm


def ria(
    weight: Float[Tensor, "out in"], inputs: InputStatistics | None, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """Relative importance and activations (Zhang et al., ICLR 2024, "Plug-and-Play", eq. 4, alpha = 1/2).

    ``(|w| / sum of its row + |w| / sum of its column) * sqrt(||x||)``, compared per output. A row or column
    of zeros counts as 0, not as NaN.
    """
    absolute = weight.abs().float()
    tiny = torch.finfo(torch.float32).tiny
    by_row = absolute / absolute.sum(1, keepdim=True).clamp_min(tiny)
    by_column = absolute / absolute.sum(0, keepdim=True).clamp_min(tiny)
    return (by_row + by_column) * _needed(inputs).norm.sqrt()


GBLM = parse(KNOWN["gblm"].text)
"""``|w| (||x|| + 25 g)``, compared per output (Das et al. 2023, arXiv 2311.04902, eq. 5).

25 is the released script's weighting in our units: its gradients are times 100, and their squares are summed over 128
windows of 2048 tokens, where g is the root mean square over the windows.
"""


def _needed(inputs: InputStatistics | None) -> InputStatistics:
    assert inputs is not None, "the caller collects what the registry says that a metric needs"
    return inputs


@dataclass(frozen=True)
class Metric:
    """A row of the registry.

    Args:
        score: the function, or the formula (see `spaces.formulas.tree`).
        needs: statistics that a function needs; a formula says it itself.
        comparison: who competes with whom unless the settings say otherwise.
        summary: one line for people.
        paper: address.
    """

    score: Score | Tree
    needs: Literal["nothing", "moments"]
    comparison: Comparison
    summary: str
    paper: str

    @property
    def formula(self) -> Tree | None:
        """The formula, if it is one."""
        return None if callable(self.score) else self.score


METRICS: dict[str, Metric] = {
    "random": Metric(random, "nothing", "output", "uniform noise, a lower bound", ""),
    "magnitude": Metric(magnitude, "nothing", "layer", "|w|", "https://arxiv.org/abs/1506.02626"),
    "wanda": Metric(wanda, "moments", "output", "|w| times input norm", "https://arxiv.org/abs/2306.11695"),
    "ria": Metric(
        ria,
        "moments",
        "output",
        "relative importance and activations",
        "https://openreview.net/forum?id=Tr0lPx9woF",
    ),
    "gblm": Metric(
        GBLM, "nothing", "output", "|w| times input norm and gradient", "https://arxiv.org/abs/2311.04902"
    ),
}
