"""Scores of a formula on a layer, defined for every weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.formulas.operations import OPERATIONS
from secateur.pruners.formulas.terminals import Terminals
from secateur.pruners.masks import as_groups
from secateur.spaces.formulas.tree import Tree, fold
from secateur.spaces.method import Comparison

LARGEST = torch.finfo(torch.float32).max
"""Beyond it a value counts as infinite in fp64, too, so that both refuse the same formulas."""


class FormulaError(ValueError):
    """Formula without a ranking of a layer's weights; the reason in one line."""


def scores(
    tree: Tree,
    terminals: Terminals,
    shape: tuple[int, int],
    *,
    comparison: Comparison = "output",
    group_size: int | None = None,
    name: str = "the layer",
) -> Float[Tensor, "out in"]:
    """Score of each weight, higher = keep.

    Values broadcast from the matrices of the terminals: those of an input to each row, those of an output to each
    column. Every step must be finite. The dtype is that of the terminals.

    Args:
        tree: the formula.
        terminals: those that it uses.
        shape: ``(out, in)``.
        comparison, group_size: who competes with whom; see `masks.prune_ranks`.
        name: the layer, for errors.

    Raises:
        FormulaError: if a step is undefined or overflows, if a terminal does not fit the layer, or if no weight
            is told from another in any comparison group.
        ValueError: if `group_size` does not divide the number of inputs.
    """
    try:
        result = _value(tree, terminals).expand(shape)
    except FormulaError as error:
        raise FormulaError(f"{error} at {name}.") from error
    except RuntimeError as error:  # torch's words for shapes that do not broadcast
        raise FormulaError(
            f"Expected one value a weight of a layer of shape {shape}, got {error} at {name}."
        ) from error
    groups = as_groups(result, comparison, group_size, name)
    if _constant(groups[:1]) and _constant(groups):
        raise FormulaError(
            f"Expected scores that tell weights apart, got a constant in every comparison group at {name}."
        )
    return result


def _constant(groups: Float[Tensor, "groups size"]) -> bool:
    return bool((groups == groups[:, :1]).all())


def _value(tree: Tree, terminals: Terminals) -> Float[Tensor, "_ _"]:
    like = next(iter(terminals.values()), torch.zeros(1, 1))

    def applied(operator: str, arguments: Sequence[Tensor]) -> Tensor:
        return _finite(operator, arguments, OPERATIONS[operator](*arguments))

    return fold(
        tree,
        lambda name: _finite(name, [], terminals[name]),
        lambda number: like.new_full((1, 1), number),
        applied,
    )


def _finite(what: str, arguments: Sequence[Tensor], value: Tensor) -> Tensor:
    """The value, checked to be finite everywhere; comparisons with NaN are False."""
    least, greatest = value.aminmax()
    if least >= -LARGEST and greatest <= LARGEST:
        return value
    fine = value.abs() <= LARGEST
    row, column = (~fine).nonzero()[0].tolist()
    operands = [f"{x.expand(value.shape)[row, column].item():.4g}" for x in arguments]
    call = f"{what}({', '.join(operands)})" if operands else what
    raise FormulaError(f"Expected finite values, got {call} = {value[row, column].item():.4g}")
