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
    row = _RULES.get(operator, _Rule())
    positive = row.positive(*arguments)
    nonnegative = positive or row.nonnegative(*arguments)
    return Facts(nonnegative, positive, row.total(*arguments) and all(x.total for x in arguments))


_Fact = Callable[..., bool]


def _never(*arguments: Facts) -> bool:
    return False


def _always(*arguments: Facts) -> bool:
    return True


def _first(x: Facts, *others: Facts) -> bool:
    return x.nonnegative


def _first_positive(x: Facts, *others: Facts) -> bool:
    return x.positive


def _both(x: Facts, y: Facts) -> bool:
    return x.nonnegative and y.nonnegative


def _both_positive(x: Facts, y: Facts) -> bool:
    return x.positive and y.positive


@dataclass(frozen=True)
class _Rule:
    """Conditions on the arguments under which each fact is known to hold for the operator."""

    nonnegative: _Fact = _never
    positive: _Fact = _never
    total: _Fact = _always


_RULES: dict[str, _Rule] = {
    "abs": _Rule(_always, _first_positive),
    "sqrt": _Rule(_always, _first_positive, total=_first),
    "square": _Rule(_always, _first_positive),
    "log": _Rule(total=_first_positive),
    "exp": _Rule(_always, _always),
    "tanh": _Rule(_first, _first_positive),
    "minmax": _Rule(_always, total=_never),
    "zscore": _Rule(total=_never),
    "rank": _Rule(_always),
    "add": _Rule(_both, lambda x, y: (x.positive and y.nonnegative) or (x.nonnegative and y.positive)),
    "mul": _Rule(_both, _both_positive),
    "div": _Rule(_both, _both_positive, total=lambda x, y: y.positive),
    "pow": _Rule(_first, _first_positive, total=_first_positive),
    "min": _Rule(_both, _both_positive),
    "max": _Rule(lambda x, y: x.nonnegative or y.nonnegative, lambda x, y: x.positive or y.positive),
}
