"""Spaces of recipes, and a loss over them with a known best one, for tests without a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from secateur.search.controller import Proposal
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.recipe.build import build_recipe
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.choices import Choice, Items, items_of
from secateur.spaces.recipe.settings import RecipeSettings
from secateur.spaces.recipe.space import RecipeSpace
from secateur.spaces.shape import BlockShape, ExpertShape, ModelShape, Prunable

LINEARS = tuple(
    Prunable(f"model.layers.{block}.{name}", block, name.partition(".")[0], 640)
    for block in range(2)
    for name in ("attention.q_proj", "attention.o_proj", "mlp.up_proj", "mlp.down_proj")
)
SHAPE = ModelShape(
    n_params=100_000,
    bytes_per_param=2,
    macs_per_token=90_000,
    kv_bytes_per_token=256,
    blocks=(BlockShape(4, 200, 20, 48, 30, 20, 220, 30, 16),) * 2,
)


EXPERTS = replace(
    SHAPE, blocks=(BlockShape(4, 200, 20, 6, 900, 20, 220, 850, 16, experts=ExpertShape(2)),) * 2
)


def recipe_space(**settings: Any) -> RecipeSpace:
    shape = EXPERTS if settings.get("unit") == "experts" else SHAPE
    return build_recipe(RecipeSettings(**settings), LINEARS, shape)


class Landscape:
    """Loss 0 at one recipe, growing with each choice that is another one, or that does not apply there.

    Args:
        space: of recipes.
        seed: of the best one and of how much each choice counts.
        metric: of the best one.
    """

    def __init__(self, space: RecipeSpace, seed: int = 0, metric: str = "blend") -> None:
        rng = np.random.default_rng(1000 + seed)  # not as controllers draw
        self.space = space
        while (best := space.sample(rng, 0)) and best.plain["metric"]["name"] != metric:
            pass
        self.best = best
        self._best = self._items(best)
        self._weights = {choice.path: rng.uniform(0.2, 2) for choice in space.choices}

    def _items(self, recipe: Recipe) -> Items:
        return items_of(recipe.plain, tuple(self.space.sources))

    def __call__(self, recipe: Recipe, fidelity: Fidelity) -> Measurement:
        items: Items = {} if recipe.is_dense else self._items(recipe)
        loss = sum(self._weights[c.path] * self._apart(c, items) for c in self.space.choices)
        values = {"loss": loss - 1 / fidelity.n_tokens, **self.space.cost(recipe)}
        return Measurement(recipe.text, fidelity, values)

    def measure(self, proposal: Proposal) -> Measurement:
        return self(proposal.candidate, proposal.fidelity)

    def _apart(self, choice: Choice, items: Items) -> float:
        if choice.path not in items and choice.path not in self._best:
            return 0.0
        if choice.path not in items or choice.path not in self._best:
            return 1.0
        first, second = (choice.position(x[choice.path]) for x in (items, self._best))
        if not choice.ordered or first is None or second is None:
            return float(first != second)
        return ((first - second) / (len(choice.options) - 1)) ** 2
