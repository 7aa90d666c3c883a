"""Trainings of a recipe: of its metric, its allocation rule, its repair and its schedule, each with its size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.retraining import schedule_size
from secateur.spaces.method import MethodRow
from secateur.spaces.methods import REPAIRS, RULES, metrics_of
from secateur.spaces.recipe.schedule import trained_tokens

SCHEDULE = "schedule"
"""Name of the schedule's training."""


def trainings_of(form: Mapping[str, Any], anatomy: Anatomy) -> dict[str, TrainingSize]:
    """Sizes of a recipe's trainings by the name of the method.

    Args:
        form: complete plain form.
        anatomy: of the model.
    """
    of = form["calibration"]
    windows = of["samples"], of["length"]
    found: dict[str, TrainingSize] = {}
    for row, section in _methods(form):
        if row.training_path:
            found[row.name] = row.training(anatomy, windows, **row.values(section))
    if trained_tokens(form):
        found[SCHEDULE] = schedule_size(anatomy, form)
    return found


def _methods(form: Mapping[str, Any]) -> Iterator[tuple[MethodRow, Mapping[str, Any]]]:
    """Rows of the methods that a recipe names, each with the section that has its parameters."""
    metric, rule = form["metric"], form.get("allocation", {})
    rows = metrics_of(form["unit"])
    if metric["name"] in rows:  # no formula, and no blend
        yield rows[metric["name"]], metric
    if rule:
        yield RULES[rule["rule"]], rule
    yield REPAIRS[form["unit"]][form["repair"]], {}
