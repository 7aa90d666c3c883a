"""Construction of the space `recipe` from its settings: options of each choice, and the tree of choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.spaces.methods import RULES
from secateur.spaces.recipe.choices import SOURCES, Items, Tree, default_of, items_of_known, nearest
from secateur.spaces.recipe.keys import MATRICES, N_CLUSTERS
from secateur.spaces.recipe.settings import RecipeSettings
from secateur.spaces.recipe.space import RecipeSpace
from secateur.spaces.shape import ModelShape, Prunable, split_protected

Options = dict[str, tuple[Sequence[Any], bool]]
"""Values by path of the item, and whether they are ordered."""

_EXPONENTS = tuple(i / 4 for i in range(9))
_ANGLES = tuple(i / 10 for i in range(11))
_QUARTERS = tuple(i / 4 for i in range(5))


def options_of(settings: RecipeSettings) -> Options:
    """Options of each choice of the search."""
    found: Options = calibration_of(settings) if "calibration" in settings.search else {}
    if "metric" in settings.search:
        found |= _metric(settings)
    if "allocation" in settings.search and settings.unit != "blocks":
        found |= _allocation(settings.allocation_options)
    if "repair" in settings.search:
        found["repair"] = settings.repair_options, False
    return found


def calibration_of(settings: RecipeSettings) -> Options:
    """Options of the calibration data."""
    names = settings.source_names
    weights = range(settings.mixture + 1) if len(names) > 1 else (1,)
    found: Options = {f"calibration.sources.{name}": (weights, True) for name in names}
    found |= {
        "calibration.samples": (settings.samples, True),
        "calibration.length": (settings.length, True),
        "calibration.choose": (settings.choose, False),
        "calibration.subset": (range(settings.subsets), False),
        "calibration.quantiles": ([tuple(pair) for pair in settings.quantiles], False),
        "calibration.gradients": (settings.gradients, False),
    }
    return found | {f"calibration.clusters.{i}": ((0, 1), False) for i in range(N_CLUSTERS)}


def _metric(settings: RecipeSettings) -> Options:
    found: Options = {"metric.name": (settings.metric_options, False)}
    if settings.unit == "blocks":
        return found
    found |= {
        "metric.order": (("none", "first", "second", "mixed"), False),
        "metric.angle": (_ANGLES[1:-1], True),  # the ends are first and second
        "metric.magnitude": (_EXPONENTS, True),
        "metric.activation": (_EXPONENTS, True),
    }
    if settings.unit == "weights":
        return found | {"metric.comparison": (("output", "layer"), False)}
    found |= {
        "metric.absolute": (("element", "vector"), False),
        "metric.norm": ((1, 2, "inf"), False),
        "metric.reduce": (("sum", "mean", "max", "prod", "output"), False),
    }
    return found | {f"metric.weights.{name}": (_QUARTERS, True) for name in MATRICES}


def _allocation(rules: Sequence[str]) -> Options:
    parameters = [parameter for rule in rules for parameter in RULES[rule].parameters]
    found: Options = {"allocation.rule": (rules, False)}
    return found | {f"allocation.{x.name}": (x.options, not isinstance(x.default, str)) for x in parameters}


def build_recipe(settings: RecipeSettings, linears: Sequence[Prunable], shape: ModelShape) -> RecipeSpace:
    """The space of these settings, for a model with these linears.

    Raises:
        ValueError: if a pattern in `protect` matches nothing or too much, or the shape has no blocks.
    """
    if settings.protect:
        split_protected(linears, settings.protect)  # raises if a pattern matches nothing, or all match
    tree = Tree(settings.unit, settings.source_names, options_of(settings), _base(settings))
    return RecipeSpace(
        settings.unit,
        settings.targets,
        tree,
        settings.texts,
        settings.start_name,
        settings.known_names,
        sum(linear.n_weights for linear in linears),
        shape,
    )


def _base(settings: RecipeSettings) -> Items:
    """Items of the start, with calibration data nearest to the defaults."""
    base = items_of_known(settings.start_name)
    for path, (values, ordered) in calibration_of(settings).items():
        default = 1 if path.startswith(SOURCES) else default_of(settings.unit, path)
        base[path] = nearest(values, default, ordered=ordered)
    return base
