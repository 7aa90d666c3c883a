"""What ranks weights in recipes that leave zeros: the metrics of the registry, formulas, and the blend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.masks import Comparison
from secateur.pruners.models.anatomy import Linear
from secateur.pruners.recipes.blend import Blend, unit_scores, weight_scores
from secateur.pruners.structure.formula_scores import formula_method, formula_scores
from secateur.pruners.structure.importance import Importance, check_importance
from secateur.pruners.weights.method import Method
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.methods import IMPORTANCES
from secateur.spaces.recipe.keys import BLEND


@runtime_checkable
class Ranking(Protocol):
    """A score for each weight of a projection; a `Method` is one, unless it updates weights."""

    @property
    def needs(self) -> Literal["nothing", "moments", "gram"]:
        """Statistics of inputs."""
        ...

    @property
    def gradients(self) -> tuple[Kind, ...]:
        """Kinds of gradients."""
        ...

    @property
    def compares(self) -> Comparison:
        """Who competes with whom."""
        ...

    def scores(
        self, linear: Linear, inputs: InputStatistics | None, whole: ModelStatistics | None = None
    ) -> Float[Tensor, "out in"]:
        """Higher = keep."""
        ...


@dataclass(frozen=True)
class BlendRanking:
    """The blend as a ranking.

    Args:
        blend: how weights are scored.
    """

    blend: Blend

    @property
    def needs(self) -> Literal["nothing", "moments"]:
        return self.blend.needs

    @property
    def gradients(self) -> tuple[Kind, ...]:
        return self.blend.gradients

    @property
    def compares(self) -> Comparison:
        return self.blend.comparison

    def scores(
        self, linear: Linear, inputs: InputStatistics | None, whole: ModelStatistics | None = None
    ) -> Float[Tensor, "out in"]:
        norm = None if inputs is None else inputs.norm
        return weight_scores(linear, self.blend, {} if whole is None else whole.gradients, norm)


def blend_of(metric: Mapping[str, Any]) -> Blend | None:
    """The blend that a recipe's section ``metric`` describes, if its metric is one."""
    if metric["name"] != BLEND:
        return None
    return Blend.of(metric)


def method_of(metric: Mapping[str, Any], *, damp: float, seed: int) -> Method:
    """What a recipe's section ``metric`` names; no blend.

    Raises:
        ValueError: if there is no such method.
    """
    name = metric["name"]
    return Method(name, metric.get("comparison"), damp=damp, seed=seed, formula=formula_of(name))


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
