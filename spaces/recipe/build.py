"""Space of recipes of some settings, for a model: its options key by key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.spaces.architecture.cost import block_shares
from secateur.spaces.methods import metrics_of
from secateur.spaces.recipe.choices import SCHEDULE, Tree
from secateur.spaces.recipe.groups import GROUP_SIZE
from secateur.spaces.recipe.keys import leaves
from secateur.spaces.recipe.settings import RecipeSettings
from secateur.spaces.recipe.space import RecipeSpace
from secateur.spaces.shape import ModelShape, Prunable, split_protected


def build_recipe(settings: RecipeSettings, linears: Sequence[Prunable], shape: ModelShape) -> RecipeSpace:
    """The space of these settings, for a model with these linears.

    Raises:
        ValueError: if a pattern in `protect` matches nothing or too much, or the shape has no blocks.
    """
    if settings.protect:
        split_protected(linears, settings.protect)  # raises if a pattern matches nothing, or all match
    start, names, options = settings.start_name, settings.source_names, _options(settings)
    search = [*settings.search, *([] if settings.schedule is None else [SCHEDULE])]
    search += [] if settings.group_size is None else [GROUP_SIZE]
    return RecipeSpace(
        settings.unit,
        block_shares(shape, settings.targets, settings.share_of),
        Tree(settings.unit, names, start, search, options),
        settings.texts,
        start,
        settings.known_names,
        sum(linear.n_weights for linear in linears),
        shape,
    ).asked_as(settings.targets)


def _options(settings: RecipeSettings) -> dict[str, tuple[Sequence[Any], bool]]:
    """Options of each key, and whether they are ordered."""
    weights = range(settings.mixture + 1) if len(settings.texts) > 1 else (1,)
    given: dict[str, tuple[Sequence[Any], bool]] = {
        "calibration.sources": (weights, True),
        "calibration.samples": (settings.samples, True),
        "calibration.length": (settings.length, True),
        "calibration.choose": (settings.choose, False),
        "calibration.subset": (range(settings.subsets), False),
        "calibration.quantiles": (settings.quantiles, False),
        "calibration.gradients": (settings.gradients, False),
        "metric.name": (settings.metric_options, False),
        **({} if settings.group_size is None else {GROUP_SIZE: (settings.group_size, False)}),
        "allocation.rule": (settings.allocation_options, False),
        "repair": (settings.repair_options, False),
    }
    if settings.schedule is not None:
        given |= {
            path: (values, not isinstance(values[0], str)) for path, values in settings.schedule.given()
        }
    if settings.protect:
        rows = metrics_of(settings.unit).values()
        whole = [x for row in rows for x in row.parameters if not x.allows_protect]
        given |= {f"metric.{x.name}": ((x.default,), False) for x in whole}
    return {key: given.get(key, (leaf.options, leaf.ordered)) for key, leaf in leaves(settings.unit).items()}
