"""Sign analysis of formulas: signs of their values, and whether they are always defined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.spaces.formulas.operators import TERMINALS
from secateur.spaces.formulas.tree import Tree, fold


@dataclass(frozen=True)
class Facts:
    """Facts that hold for all weights; False = unknown.

    Args:
        nonnegative: values are >= 0 where defined.
        positive: values are > 0 where defined, up to underflow.
        total: values are defined, up to overflow.
    """

    nonnegative: bool
    positive: bool
    total: bool


def facts_of(tree: Tree) -> Facts:
    """Facts about a formula's values."""
    return fold(tree, _terminal, _constant, _applied)


def _terminal(name: str) -> Facts:
    row = TERMINALS.get(name)
    return Facts(row is not None and row.nonnegative, False, True)


def _constant(value: float) -> Facts:
    return Facts(value >= 0, value > 0, True)


def _applied(operator: str, arguments: Sequence[Facts]) -> Facts:
    positive = _POSITIVE.get(operator, _never)(*arguments)
    nonnegative = positive or _NONNEGATIVE.get(operator, _never)(*arguments)
    total = _TOTAL.get(operator, _always)(*arguments) and all(x.total for x in arguments)
    return Facts(nonnegative, positive, total)


_Fact = Callable[..., bool]


def _never(*arguments: Facts) -> bool:
    return False


def _always(*arguments: Facts) -> bool:
    return True


def _first(x: Facts, *others: Facts) -> bool:
    return x.nonnegative


def _both(x: Facts, y: Facts) -> bool:
    return x.nonnegative and y.nonnegative


_NONNEGATIVE: dict[str, _Fact] = {
    "abs": _always,
    "sqrt": _always,
    "square": _always,
    "exp": _always,
    "minmax": _always,
    "rank": _always,
    "tanh": _first,
    "add": _both,
    "mul": _both,
    "div": _both,
    "pow": _first,
    "min": _both,
    "max": lambda x, y: x.nonnegative or y.nonnegative,
}

_POSITIVE: dict[str, _Fact] = {
    "abs": lambda x: x.positive,
    "sqrt": lambda x: x.positive,
    "square": lambda x: x.positive,
    "exp": _always,
    "tanh": lambda x: x.positive,
    "add": lambda x, y: (x.positive and y.nonnegative) or (x.nonnegative and y.positive),
    "mul": lambda x, y: x.positive and y.positive,
    "div": lambda x, y: x.positive and y.positive,
    "pow": lambda x, y: x.positive,
    "min": lambda x, y: x.positive and y.positive,
    "max": lambda x, y: x.positive or y.positive,
}

_TOTAL: dict[str, _Fact] = {
    "sqrt": _first,
    "log": lambda x: x.positive,
    "div": lambda x, y: y.positive,
    "pow": lambda x, y: x.positive,
    "minmax": _never,
    "zscore": _never,
}
"""Operators with a restricted domain: conditions under which they are known to be defined."""
