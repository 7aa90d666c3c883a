"""Formulas as plain data, for those who compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from secateur.spaces.formulas.tree import Tree, fold

Program: TypeAlias = str | float | tuple["Program", ...]
"""A terminal's name, a number, or an operator's name and its arguments: ``("mul", ("abs", "W"), "X")``."""


def program(tree: Tree) -> Program:
    """The tree as nested tuples of names and numbers."""
    return fold(tree, _terminal, _constant, _applied)


def _terminal(name: str) -> Program:
    return name


def _constant(value: float) -> Program:
    return value


def _applied(operator: str, arguments: Sequence[Program]) -> Program:
    return (operator, *arguments)
