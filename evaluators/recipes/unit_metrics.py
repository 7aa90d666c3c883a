"""What ranks units in recipes that cut: the importances of the registry, and the blend."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from secateur.evaluators.recipes.weight_metrics import blend_of
from secateur.pruners.recipes.blend import unit_scores
from secateur.pruners.structure.importance import IMPORTANCES, ImportanceRow, check_importance


def importance_of(metric: Mapping[str, Any]) -> ImportanceRow:
    """The importance that a recipe's section ``metric`` describes.

    Raises:
        ValueError: if there is no such importance.
    """
    blend = blend_of(metric)
    if blend is None:
        check_importance(metric["name"])
        return IMPORTANCES[metric["name"]]
    score = partial(unit_scores, blend=blend)
    return ImportanceRow(score, blend.needs, "", "the blend", blend.gradients)
