"""Formulas in LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.spaces.formulas.operators import ATOM, OPERATORS, TERMINALS
from secateur.spaces.formulas.tree import Tree, fold

_Typeset = tuple[str, int]
"""Text and its precedence."""


def latex(tree: Tree) -> str:
    """The formula in LaTeX, for math mode (with amsmath)."""
    return fold(tree, _terminal, _constant, _applied)[0]


def _terminal(name: str) -> _Typeset:
    return TERMINALS[name].latex, ATOM


def _constant(value: float) -> _Typeset:
    mantissa, _, exponent = f"{value:.6g}".partition("e")
    if exponent:
        return rf"{mantissa} \cdot 10^{{{int(exponent)}}}", 1 if value < 0 else 2
    return mantissa, 1 if value < 0 else ATOM


def _applied(operator: str, arguments: Sequence[_Typeset]) -> _Typeset:
    row = OPERATORS[operator]
    pieces = [
        piece if binds >= needed else rf"\left( {piece} \right)"
        for (piece, binds), needed in zip(arguments, row.needs, strict=True)
    ]
    return row.latex.format(*pieces), row.binds
