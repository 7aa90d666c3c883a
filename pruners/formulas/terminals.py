"""The quantities that formulas are made of, as tensors of a layer.

The names are those of `secateur.spaces.formulas.operators`; a test holds the two tables together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.linalg import inverse_factor
from secateur.pruners.models.anatomy import Linear

Pass = Literal["weights", "moments", "gram", "gradients"]

TERMINALS: dict[str, Pass] = {
    "W": "weights",
    "G": "gradients",
    "X": "moments",
    "H": "gram",
    "R": "weights",
    "C": "weights",
    "P": "weights",
}
"""Where each comes from."""

Terminals: TypeAlias = Mapping[str, Float[Tensor, "_ _"]]
"""By name, as matrices: W and G ``out in``; X, H and C ``1 in``; R ``out 1``; P ``1 1``."""


def terminals_of(
    linear: Linear,
    names: Collection[str],
    inputs: InputStatistics | None,
    whole: ModelStatistics | None,
    *,
    damp: float = 0.01,
) -> Terminals:
    """The named quantities of a layer, in fp32 (fp64 weights stay that).

    Args:
        linear: the layer; W is its weight as it is now.
        names: which ones.
        inputs: for X and H (with `gram`).
        whole: for P, and for G.
        damp: added to the second moment's diagonal before it is inverted, as a fraction of its mean.

    Raises:
        ValueError: if statistics that are needed were not collected, or are not finite.
    """
    weight = linear.weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    absolute = weight.abs()
    make = {
        "W": lambda: weight,
        "G": lambda: _given(whole, "G", linear).gradients["rms"][linear.name],
        "X": lambda: _given(inputs, "X", linear).norm[None, :],
        "H": lambda: inverse_factor(_given(inputs, "H", linear), damp, linear.name).square().sum(0)[None, :],
        "R": lambda: absolute.sum(1, keepdim=True),
        "C": lambda: absolute.sum(0, keepdim=True),
        "P": lambda: _position(linear, _given(whole, "P", linear)),
    }
    return {name: make[name]().to(weight) for name in names}


def _position(linear: Linear, whole: ModelStatistics) -> Tensor:
    return torch.full((1, 1), linear.block / max(whole.n_blocks - 1, 1))


def _given(statistics, name: str, linear: Linear):  # type: ignore[no-untyped-def]  # gives back what it gets
    missing = statistics is None or (name == "G" and linear.name not in statistics.gradients.get("rms", {}))
    if missing or (name == "H" and statistics.gram is None):
        raise ValueError(
            f"Expected the {TERMINALS[name]} pass to provide the terminal {name}, got nothing at {linear.name}."
        )
    return statistics
