"""Formulas as names of metrics: ``formula: abs(W) * X``."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from secateur.spaces.formulas.grammar import FormulaTextError, parse, print_formula
from secateur.spaces.formulas.operators import TERMINALS
from secateur.spaces.formulas.tree import Tree, terminals_in
from secateur.spaces.method import CONTRAST, Unit
from secateur.spaces.methods import REGISTERED, metrics_of

PREFIX = "formula:"


def formula_of(metric: str) -> Tree | None:
    """Formula in a metric's name, or None for the name of another metric.

    Raises:
        FormulaTextError: if the text after the prefix is not a formula; columns count from there.
    """
    return parse(metric.removeprefix(PREFIX).strip()) if metric.startswith(PREFIX) else None


def needs_contrast(metric: str, unit: Unit) -> bool:
    """True if a metric of recipes, or a formula, needs a second calibration text."""
    tree = formula_of(metric)
    if tree is not None:
        return any(
            TERMINALS[name].source.startswith(CONTRAST) for name in terminals_in(tree) if name in TERMINALS
        )
    row = metrics_of(unit).get(metric)
    return row is not None and row.contrasts


def metric_of(tree: Tree) -> str:
    """Name of a metric for a formula; inverse of `formula_of`."""
    return f"{PREFIX} {print_formula(tree)}"


def _as_text(metric: object) -> object:
    is_formula = isinstance(metric, dict) and list(metric) == ["formula"]
    return f"{PREFIX} {metric['formula']}" if is_formula else metric  # type: ignore[index]


def _canonical(metric: str, info: ValidationInfo) -> str:
    try:
        tree = formula_of(metric)
    except FormulaTextError as error:
        raise ValueError(f"`{info.field_name}`: {error}") from error
    registered = REGISTERED.get(metric)
    own = registered.path if registered is not None and registered.path else metric
    return own if tree is None else metric_of(tree)


MetricName = Annotated[str, BeforeValidator(_as_text), AfterValidator(_canonical)]
"""Field of settings: the canonical text of a formula, or any other name, which the pruners check. A name that was
registered in Python becomes the path of its function, which other processes find.

Accepts the mapping that YAML reads from ``formula: ...`` without quotes.
"""
