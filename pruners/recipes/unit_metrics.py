"""What ranks units in recipes that cut: the importances of the registry, formulas, and the blend."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from secateur.pruners.recipes.blend import unit_scores
from secateur.pruners.recipes.scores import blend_of
from secateur.pruners.structure.formula_scores import formula_method, formula_scores
from secateur.pruners.structure.importance import Importance, check_importance
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.methods import IMPORTANCES


def importance_of(metric: Mapping[str, Any], n_blocks: int = 1) -> Importance:
    """The importance that a recipe's section ``metric`` describes.

    Args:
        metric: complete, or its name alone.
        n_blocks: of the model, for formulas with the block's position; what is needed does not depend on it.

    Raises:
        ValueError: if there is no such importance.
    """
    blend = blend_of(metric)
    if blend is not None:
        score = partial(unit_scores, blend=blend)
        return Importance(score, blend.needs, blend.gradients)
    formula = formula_of(metric["name"])
    if formula is not None:
        score = partial(formula_scores, formula=formula, n_blocks=n_blocks)
        method = formula_method(formula)
        return Importance(score, method.needs, method.gradients)
    check_importance(metric["name"], key="metric")
    row = IMPORTANCES[metric["name"]]
    return Importance(row.function, row.inputs, row.gradients)
