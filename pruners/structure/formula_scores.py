"""A formula as the importance of units."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.weights.method import Method
from secateur.spaces.formulas.tree import Tree


def formula_scores(evidence: Evidence, formula: Tree, n_blocks: int) -> Float[Tensor, " units"]:
    """Mean of a formula's values over a column of the output projection, and over a unit's columns.

    What FLAP's authors made of Wanda for structures (arXiv 2312.11983), with any formula: ``abs(W) * X`` is `wanda_sp`.

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
    weights = formula_method(formula, evidence.damp).scores(evidence.layout.output, inputs, whole)
    return evidence.by_unit(weights.mean(0)).mean(1)


def formula_method(formula: Tree, damp: float = 0.01) -> Method:
    """The formula as a metric of weights."""
    return Method("formula", damp=damp, formula=formula)
