"""Formulas where a metric is named: ``formula: abs(W) * X``."""

from __future__ import annotations

from secateur.spaces.formulas.grammar import parse, print_formula
from secateur.spaces.formulas.tree import Tree

PREFIX = "formula:"


def formula_of(metric: str) -> Tree | None:
    """The formula that a metric's name spells out, or None for the name of another metric.

    Raises:
        FormulaTextError: if what follows the prefix is no formula; columns count from there.
    """
    return parse(metric.removeprefix(PREFIX).strip()) if metric.startswith(PREFIX) else None


def metric_of(tree: Tree) -> str:
    """The formula as the name of a metric; `formula_of` is its inverse."""
    return f"{PREFIX} {print_formula(tree)}"
