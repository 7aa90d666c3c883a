"""What a search over recipes tries of each thing that it chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from secateur.spaces.recipe.keys import MATRICES, N_CLUSTERS, Unit
from secateur.spaces.recipe.rules import RULES

if TYPE_CHECKING:
    from secateur.spaces.recipe.settings import RecipeSettings

Options = dict[str, tuple[Sequence[Any], bool]]
"""By path of the item: values, and whether neighbouring ones are similar."""

METRICS: dict[Unit, tuple[str, ...]] = {
    "weights": ("blend", "wanda", "ria", "sparsegpt"),
    "structure": ("blend", "wanda_sp", "flap", "cfsp", "obs"),
    "blocks": ("shortgpt", "last", "shortened_ppl", "shortened_taylor"),
}
"""Where the settings name none."""
REPAIRS: dict[Unit, tuple[str, ...]] = {
    "weights": ("none", "bias", "obs", "admm"),
    "structure": ("none", "bias", "refit", "obs", "admm"),
    "blocks": ("none", "laco", "mka"),
}
"""Likewise: what takes about as long as the rest."""

_EXPONENTS = tuple(i / 4 for i in range(9))
_ANGLES = tuple(i / 10 for i in range(11))
_QUARTERS = tuple(i / 4 for i in range(5))


def rules_of(unit: Unit) -> tuple[str, ...]:
    """The rules of allocation that need no file."""
    return tuple(name for name, row in RULES.items() if unit in row.units and "profile" not in row.needs)


def options_of(settings: RecipeSettings) -> Options:
    """The options of all that is searched."""
    found: Options = calibration_of(settings) if "calibration" in settings.search else {}
    if "metric" in settings.search:
        found |= _metric(settings)
    if "allocation" in settings.search and settings.unit != "blocks":
        found |= _allocation(settings.allocation_options)
    if "repair" in settings.search:
        found["repair"] = settings.repair_options, False
    return found


def calibration_of(settings: RecipeSettings) -> Options:
    """Those of calibration data."""
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
    knobs = [knob for rule in rules for knob in RULES[rule].knobs]
    found: Options = {"allocation.rule": (rules, False)}
    return found | {f"allocation.{x.name}": (x.options, not isinstance(x.default, str)) for x in knobs}
