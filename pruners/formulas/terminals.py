"""Terminals of formulas as tensors of a layer, and the statistics that they need."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.linalg import inverse_factor
from secateur.pruners.models.anatomy import Linear
from secateur.spaces.formulas.operators import OPERATORS, TERMINALS
from secateur.spaces.formulas.tree import Apply, Constant, Terminal, Tree, subtrees
from secateur.spaces.methods import Detail

Terminals: TypeAlias = Mapping[str, Float[Tensor, "_ _"]]
"""By name, as matrices: W and G ``out in``; X, H and C ``1 in``; R ``out 1``; P ``1 1``."""


@dataclass(frozen=True)
class Needs:
    """Statistics to collect before a formula can be computed.

    Args:
        inputs: nothing, second moments, or Gram matrices of the layer's inputs.
        gradients: gradients of the loss.
    """

    inputs: Detail
    gradients: bool


def needs(tree: Tree) -> Needs:
    """Statistics that a formula needs.

    Raises:
        ValueError: on a terminal or an operator that is not in the tables.
    """
    sources = set()
    for _, node in subtrees(tree):
        if isinstance(node, Terminal) and node.name in TERMINALS:
            sources.add(TERMINALS[node.name].source)
        elif not isinstance(node, Constant) and not _is_known(node):
            raise ValueError(
                f"Expected a formula of {', '.join(TERMINALS)}, numbers, and {', '.join(OPERATORS)}, got {node!r}."
            )
    inputs: Literal["gram", "moments"] = "gram" if "gram" in sources else "moments"
    return Needs(inputs if sources & {"gram", "moments"} else "nothing", "gradients" in sources)


def _is_known(node: Tree) -> bool:
    if not isinstance(node, Apply) or node.operator not in OPERATORS:
        return False
    return OPERATORS[node.operator].arity == len(node.arguments)


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
            f"Expected the {TERMINALS[name].source} pass to provide the terminal {name}, got nothing at {linear.name}."
        )
    return statistics
