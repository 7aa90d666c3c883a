"""Settings of the proxy for the loss of recipes, and which recipes have one."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import Field

from secateur.spaces.method import Unit
from secateur.spaces.methods import RULES, metrics_of
from secateur.spaces.section import Section


class RecipeProxySettings(Section):
    """Proxy for the loss of recipes: the loss that the curvature foretells of the pruned weights of some blocks.

    It takes one forward and backward pass over 2,048 tokens of the calibration set, once, and no pass for a recipe,
    whose weights are pruned all the same. A recipe whose schedule trains is foretold from its untrained form: its
    rounds, each with statistics of what is left, without the training.

    Args:
        blocks: number of evenly spread blocks; inputs and gradients of their projections are stored on disk.
    """

    blocks: int = Field(default=8, gt=0)

    def check_recipes(
        self, unit: Unit, metrics: Collection[str], rules: Collection[str], *, trains: bool
    ) -> None:
        """Check that recipes of these choices can be foretold.

        Args:
            unit: of the recipes.
            metrics: names.
            rules: names.
            trains: whether training in a schedule is one of the choices.

        Raises:
            ValueError: for units that are cut, and for what has no untrained form.
        """
        if unit != "weights":
            raise ValueError(
                f"Expected `proxy` with the unit weights, got {unit}. Leave it out: what is cut off has no "
                "curvature of its own."
            )
        known = metrics_of(unit)
        training = ["a `schedule`"] if trains else []
        training += [f"the metric {x}" for x in metrics if x in known and known[x].trains]
        training += [f"the rule {x}" for x in rules if RULES[x].trains]
        if training:
            raise ValueError(
                f"Expected no `proxy` with {training[0]} that trains, got one: recipes are foretold from their weights "
                "before any training. Leave one out."
            )
