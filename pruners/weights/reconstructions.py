"""Methods whose levels are weights: they update what stays, or choose a mask that is none of a ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.masks import Comparison
from secateur.pruners.weights.admm import admm
from secateur.pruners.weights.dsnot import dsnot
from secateur.pruners.weights.sparsegpt import sparsegpt


@dataclass(frozen=True)
class Layer:
    """What a reconstruction works with.

    Args:
        weight: dense.
        inputs: with what the registry says that is needed.
        comparison: who competes with whom; None: as the method has it.
        group_size: of patterns; None: none.
        damp: added to the second moment's diagonal, as a fraction of its mean.
        block_size: columns that are pruned together, where the method has that.
        name: for errors.
    """

    weight: Float[Tensor, "out in"]
    inputs: InputStatistics
    comparison: Comparison | None
    group_size: int | None
    damp: float
    block_size: int
    name: str


Reconstruct = Callable[[Layer, Sequence[float]], Float[Tensor, "levels out in"]]


def _by_sparsegpt(layer: Layer, sparsities: Sequence[float]) -> Float[Tensor, "levels out in"]:
    return sparsegpt(
        layer.weight,
        layer.inputs,
        sparsities,
        group_size=layer.group_size,
        block_size=layer.block_size,
        damp=layer.damp,
        name=layer.name,
    )


def _by_admm(layer: Layer, sparsities: Sequence[float]) -> Float[Tensor, "levels out in"]:
    return admm(
        layer.weight,
        layer.inputs,
        sparsities,
        comparison=layer.comparison or "output",
        group_size=layer.group_size,
        damp=layer.damp,
        name=layer.name,
    )


def _by_dsnot(layer: Layer, sparsities: Sequence[float]) -> Float[Tensor, "levels out in"]:
    return dsnot(
        layer.weight, layer.inputs, sparsities, comparison=layer.comparison or "output", name=layer.name
    )


@dataclass(frozen=True)
class Reconstruction:
    """A row of the registry.

    Args:
        function: the weight at each sparsity, pruned entries exactly zero, as many as `budget.n_zeros` says.
        needs: statistics that must be collected first.
        patterns: it can prune n of m.
        summary: one line for people.
        paper: address.
    """

    function: Reconstruct
    needs: Literal["moments", "gram"]
    patterns: bool
    summary: str
    paper: str


RECONSTRUCTIONS: dict[str, Reconstruction] = {
    "sparsegpt": Reconstruction(
        _by_sparsegpt,
        "gram",
        True,
        "blocked optimal brain surgery with weight update",
        "https://arxiv.org/abs/2301.00774",
    ),
    "admm": Reconstruction(
        _by_admm,
        "gram",
        True,
        "Wanda's mask, weights fitted by alternating directions",
        "https://arxiv.org/abs/2401.02938",
    ),
    "dsnot": Reconstruction(
        _by_dsnot,
        "moments",
        False,
        "Wanda's mask with weights swapped until mean outputs agree, no update",
        "https://arxiv.org/abs/2310.08915",
    ),
}
