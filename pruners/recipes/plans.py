"""Plans of recipes, made once, and kept while their batch is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from typing import Any

from secateur.pruners.pruner import Config, InfeasibleError
from secateur.pruners.recipes.blocks import plan_blocks
from secateur.pruners.recipes.context import RecipeContext
from secateur.pruners.recipes.experts import plan_experts
from secateur.pruners.recipes.plan import PruningPlan
from secateur.pruners.recipes.units import plan_units
from secateur.pruners.recipes.weights import plan_weights
from secateur.pruners.stores.block_files import LevelStoreError

N_PLANS = 64
"""Number of plans in memory, the last ones used."""

PLAN: dict[str, Callable[[RecipeContext, Config], PruningPlan]] = {
    "weights": plan_weights,
    "structure": plan_units,
    "blocks": plan_blocks,
    "experts": plan_experts,
}


class Plans:
    """Plans of the recipes of a unit.

    Args:
        unit: of the recipes, a key of `PLAN`.
        context: that they are planned on.
    """

    def __init__(self, unit: str, context: RecipeContext) -> None:
        self._plan, self.context = PLAN[unit], context
        self._plans: dict[str, PruningPlan] = {}
        self._of_keys: dict[tuple[int, Hashable], PruningPlan] = {}

    def of(self, config: Config) -> PruningPlan | None:
        """The plan of a recipe, made once; None for the dense model.

        The model must be dense, unless the recipe was planned lately.

        Raises:
            InfeasibleError: if the recipe can't be carried out, with the reason.
            LevelStoreError: if there is no room for statistics.
        """
        if not config["sparsity"]:
            return None
        name = json.dumps(config, sort_keys=True)
        plan = self._plans.pop(name, None)
        if plan is None:
            self._evict()
            try:
                plan = self._plan(self.context, config)
            except LevelStoreError:
                raise
            except ValueError as error:
                raise InfeasibleError(str(error)) from error
        self._plans[name] = plan  # the last one is the one used last
        return plan

    def hold(self, plan: PruningPlan) -> None:
        """Keep a plan for its blocks' keys until `release`."""
        self._of_keys |= dict.fromkeys(enumerate(plan.keys), plan)

    def at(self, block: int, key: Any) -> PruningPlan:
        """The plan that is held for a block's key."""
        return self._of_keys[block, key]

    def release(self) -> None:
        """Hold no plan."""
        self._of_keys.clear()

    def _evict(self) -> None:
        """Evict plans of earlier batches: all but the last few, and those without statistics in memory.

        A plan keeps its mapped files on the disk.
        """
        under_way = set(map(id, self._of_keys.values()))
        earlier = [name for name, plan in self._plans.items() if id(plan) not in under_way]
        for place, name in enumerate(reversed(earlier)):
            if place >= N_PLANS or not self.context.holds(json.loads(name)["calibration"]):
                del self._plans[name]
