"""From the allocation section of a recipe to how many units of each layer go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import Evidence, Layer
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.spaces.methods import RULES

Needs = Literal["nothing", "moments", "gram"]
_NEEDS: tuple[Needs, ...] = ("nothing", "moments", "gram")


def rule_needs(config: Mapping[str, Any]) -> frozenset[str]:
    """What the rule must know beyond the sizes of layers."""
    return frozenset(RULES[config["allocation"]["rule"]].evidence)


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rule's own parameters."""
    return {name: value for name, value in config["allocation"].items() if name != "rule"}


def removed(
    config: Mapping[str, Any],
    layers: Sequence[Layer],
    context: RecipeContext,
    sample: Sample,
    *,
    flap: Callable[[], Sequence[np.ndarray]] = tuple,
    outliers: Callable[[], Sequence[float]] = tuple,
) -> tuple[int, ...]:
    """How many units of each layer go, in the order of the layers.

    Args:
        config: a recipe.
        layers: that share the budget, with scores where the rule needs them.
        context: of the recipe.
        sample: its windows.
        flap, outliers: give the parts of `Evidence` of these names, if they are needed.

    Raises:
        BudgetError: if the rule can't reach the sparsity.
    """
    needs = rule_needs(config)
    evidence = Evidence(
        influence=tuple(sample.statistics.influence) if "influence" in needs else (),
        flap=tuple(flap()) if "flap" in needs else (),
        outliers=tuple(outliers()) if "outliers" in needs else (),
        profile=context.profile if "profile" in needs else (),
    )
    return allocate(config["allocation"]["rule"], layers, evidence, config["sparsity"], **options(config))


def most(*needs: Needs) -> Literal["moments", "gram"] | None:
    """The statistics that serve all of these; None: none."""
    found = _NEEDS[max(map(_NEEDS.index, needs))]
    return None if found == "nothing" else found
