"""Metrics of recipes: of the table of methods, formulas, and the blend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.recipes.blend import Blend, unit_scores
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.method import check_importance
from secateur.pruners.weights.method import Method
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.formulas.tree import Tree
from secateur.spaces.method import Detail
from secateur.spaces.methods import IMPORTANCES
from secateur.spaces.recipe.keys import BLEND

Ranking: TypeAlias = Method | Blend
"""Metric of weights; a method that updates weights ranks none."""


@dataclass(frozen=True)
class Importance:
    """Importance of units: a row of the table of methods, a formula, or a blend.

    Args:
        function: the score.
        needs: statistics of inputs that must be collected first.
        gradients: kinds of gradients that must be collected first.
    """

    function: Callable[[Evidence], Float[Tensor, " units"]]
    needs: Detail
    gradients: tuple[Kind, ...] = ()


def ranking_of(metric: Mapping[str, Any], *, dampening: float, seed: int) -> Ranking:
    """The metric of weights that a recipe's section ``metric`` describes.

    Raises:
        ValueError: if there is no such method.
    """
    name = metric["name"]
    if name == BLEND:
        return Blend.of(metric)
    return Method(
        name,
        metric.get("comparison"),
        metric.get("group_size"),
        dampening=dampening,
        seed=seed,
        formula=formula_of(name),
    )


def importance_of(metric: Mapping[str, Any], n_blocks: int = 1) -> Importance:
    """The importance that a recipe's section ``metric`` describes.

    Args:
        metric: complete, or its name alone.
        n_blocks: of the model, for formulas with the block's position; `needs` does not depend on it.

    Raises:
        ValueError: if there is no such importance.
    """
    name = metric["name"]
    if name == BLEND:
        blend = Blend.of(metric)
        return Importance(partial(unit_scores, blend=blend), blend.needs, blend.gradients)
    formula = formula_of(name)
    if formula is not None:
        score = partial(formula_scores, formula=formula, n_blocks=n_blocks)
        method = formula_method(formula)
        return Importance(score, method.needs, method.gradients)
    check_importance(name, key="metric")
    row = IMPORTANCES[name]
    return Importance(row.function, row.inputs, row.gradients)


def formula_scores(evidence: Evidence, formula: Tree, n_blocks: int) -> Float[Tensor, " units"]:
    """Mean of a formula's values over a column of the output projection, and over a unit's columns.

    Wanda for structures by FLAP's authors (arXiv 2312.11983), with any formula: ``abs(W) * X`` is `wanda_sp`.

    Args:
        evidence: with the inputs and gradients that `formula_method` of the formula needs.
        formula: its tree.
        n_blocks: of the model, for the block's position in it.

    Raises:
        FormulaError: if the formula gives no ranking of the output projection's weights.
    """
    seen = evidence.inputs
    inputs = None if seen is None else InputStatistics(seen.n_tokens, seen.sum_squares.float(), seen.gram)
    whole = ModelStatistics(n_blocks, evidence.gradients)
    weights = formula_method(formula, evidence.dampening).scores(evidence.layout.output, inputs, whole)
    return evidence.by_unit(weights.mean(0)).mean(1)


def formula_method(formula: Tree, dampening: float = 0.01) -> Method:
    """The formula as a metric of weights."""
    return Method("formula", dampening=dampening, formula=formula)
