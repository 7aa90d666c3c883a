"""Terminals of formulas as tensors of a layer, and the statistics that they need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.linalg import inverse_factor
from secateur.pruners.models.anatomy import Linear
from secateur.spaces.formulas.operators import OPERATORS, TERMINALS
from secateur.spaces.formulas.tree import Apply, Constant, Terminal, Tree, subtrees
from secateur.spaces.method import Detail

Terminals: TypeAlias = Mapping[str, Float[Tensor, "_ _"]]
"""By name, as matrices: W, G and G2 ``out in``; X, X2, T, H and C ``1 in``; R ``out 1``; P ``1 1``."""

COLLECTED: dict[str, Kind] = {"G": "rms", "G2": "contrast_rms", "T": "damage_norms", "X2": "contrast_norms"}
"""Kinds of gradients, or statistics of the whole model, that terminals are."""


def kinds_of(names: Collection[str]) -> tuple[Kind, ...]:
    """Kinds that these terminals need, in the order of `COLLECTED`."""
    return tuple(kind for name, kind in COLLECTED.items() if name in names)


def needs(tree: Tree) -> tuple[Detail, tuple[Kind, ...]]:
    """Statistics of inputs, and kinds of gradients, that a formula needs.

    Raises:
        ValueError: on a terminal or an operator that is not in the tables.
    """
    names = set()
    for _, node in subtrees(tree):
        if isinstance(node, Terminal) and node.name in TERMINALS:
            names.add(node.name)
        elif not isinstance(node, Constant) and not (
            isinstance(node, Apply)
            and node.operator in OPERATORS
            and OPERATORS[node.operator].arity == len(node.arguments)
        ):
            raise ValueError(
                f"Expected a formula of {', '.join(TERMINALS)}, numbers, and {', '.join(OPERATORS)}, got {node!r}."
            )
    sources = {TERMINALS[name].source for name in names}
    inputs: Detail = "gram" if "gram" in sources else "moments" if "moments" in sources else "nothing"
    return inputs, kinds_of(names)


def terminals_of(
    linear: Linear,
    names: Collection[str],
    inputs: InputStatistics | None,
    whole: ModelStatistics | None,
    *,
    dampening: float = 0.01,
    weight: Float[Tensor, "out in"] | None = None,
) -> Terminals:
    """Named terminals of a layer, in fp32; of fp64 weights in fp64.

    Args:
        linear: the layer.
        names: of the terminals.
        inputs: for X and H (with `gram`).
        whole: for P, and for those of `COLLECTED`.
        dampening: added to the second moment's diagonal before it is inverted, as a fraction of its mean.
        weight: W; None: the layer's weight as it is now.

    Raises:
        ValueError: if statistics that are needed were not collected, or are not finite.
    """
    weight = linear.weight if weight is None else weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    absolute = weight.abs()

    def collected(name: str) -> Tensor:
        found: Tensor = _given(whole, name, linear).gradients[COLLECTED[name]][linear.name]
        return found if found.ndim > 1 else found[None, :]

    make: dict[str, Callable[[], Tensor]] = {
        "W": lambda: weight,
        **{name: partial(collected, name) for name in COLLECTED},
        "X": lambda: _given(inputs, "X", linear).norm[None, :],
        "H": lambda: (
            inverse_factor(_given(inputs, "H", linear), dampening, linear.name).square().sum(0)[None, :]
        ),
        "R": lambda: absolute.sum(1, keepdim=True),
        "C": lambda: absolute.sum(0, keepdim=True),
        "P": lambda: torch.full((1, 1), linear.block / max(_given(whole, "P", linear).n_blocks - 1, 1)),
    }
    return {name: make[name]().to(weight) for name in names}


def _given(statistics, name: str, linear: Linear):  # type: ignore[no-untyped-def]  # gives back what it gets
    missing = statistics is None or (
        name in COLLECTED and linear.name not in statistics.gradients.get(COLLECTED[name], {})
    )
    if missing or (name == "H" and statistics.gram is None):
        raise ValueError(
            f"Expected the {TERMINALS[name].source} pass to provide the terminal {name}, got nothing at {linear.name}."
        )
    return statistics


def spread(total: int, n: int) -> Int[Tensor, " chosen"]:
    """Indices of `n` out of so many, evenly spread, or of all if there are fewer."""
    return torch.linspace(0, total - 1, min(n, total)).round().long()


def some_rows(terminals: Mapping[str, Float[Tensor, "_ _"]], rows: int) -> Terminals:
    """Terminals of so many rows, evenly spread over the layer; those that belong to no row are unchanged."""
    n_out = len(terminals["W"])
    chosen = spread(n_out, rows)
    return {name: x[chosen.to(x.device)] if x.shape[0] == n_out > 1 else x for name, x in terminals.items()}
