"""Formulas as names of metrics: ``formula: abs(W) * X``."""

from __future__ import annotations

from secateur.spaces.formulas.grammar import parse, print_formula
from secateur.spaces.formulas.tree import Tree

PREFIX = "formula:"


def formula_of(metric: str) -> Tree | None:
    """Formula in a metric's name, or None for the name of another metric.

    Raises:
        FormulaTextError: if the text after the prefix is not a formula; columns count from there.
    """
    return parse(metric.removeprefix(PREFIX).strip()) if metric.startswith(PREFIX) else None


def metric_of(tree: Tree) -> str:
    """Name of a metric for a formula; inverse of `formula_of`."""
    return f"{PREFIX} {print_formula(tree)}"
