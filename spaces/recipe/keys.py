"""Keys of a recipe's plain form: conditions, allowed values and defaults."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from secateur.spaces.method import MethodRow, Unit
from secateur.spaces.methods import IMPORTANCES, REPAIRS, RULES, UNIT_RECONSTRUCTIONS, metrics_of, searched

BLEND = "blend"
BLENDED: tuple[Unit, ...] = ("weights", "structure")
"""Units whose metric may be the blend, or a formula."""
N_CLUSTERS = 8
CHUNK = 32
"""Tokens of a chunk, the unit of `choose`: windows of several chunks are chosen by the values of their chunks."""
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
N_ATTENTION = 4
"""Number of attention matrices among them; the others are of the MLP."""

SCHEDULED: tuple[Unit, ...] = ("weights", "structure", "blocks")
"""Units that may be removed in rounds."""

TRAINING = ("schedule.before", "schedule.retrain", "schedule.after")
"""Keys with tokens of training: before the first round, in each round, and after the last one."""

MOST_ROUNDS, MOST_TOKENS = 1000, 1_000_000_000
"""Largest number of rounds of a schedule, and of tokens of a phase of its training, which is a light one."""

Flat = Mapping[str, Any]
"""Values by ``section.key``."""


@dataclass(frozen=True)
class Condition:
    """Condition that another key, if it applies, has one of these values (or none, if `negated`)."""

    path: str
    values: tuple[Any, ...]
    negated: bool = False

    def holds(self, value: Any) -> bool:
        return (value in self.values) != self.negated


@dataclass(frozen=True)
class ValueRule:
    """Allowed values of a key.

    Args:
        words: text between the key and the value in an error.
        holds: whether a value is allowed.
    """

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Leaf:
    """One key of the plain form.

    Args:
        default: of a missing key.
        rule: allowed values.
        when: conditions, all of which must hold for the key to apply.
        options: values that a search tries where the settings name none.
        ordered: neighbouring options mean similar recipes.
        later: not written at its default: texts of recipes are older than the key.
    """

    default: Any
    rule: ValueRule
    when: tuple[Condition, ...] = ()
    options: tuple[Any, ...] = ()
    ordered: bool = False
    later: bool = False

    def applies(self, flat: Flat) -> bool:
        """True if the key applies, given the keys before it."""
        return all(c.path not in flat or c.holds(flat[c.path]) for c in self.when)


def is_number(value: Any) -> bool:
    """True if it is a finite number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """True if it is a whole number of any type."""
    return is_number(value) and float(value).is_integer()


def _between(low: float, high: float) -> ValueRule:
    return ValueRule(f"within [{low:g}, {high:g}]", lambda x: is_number(x) and low <= x <= high)


def _whole(low: int, high: float = math.inf) -> ValueRule:
    words = f">= {low}" if high == math.inf else f"within [{low}, {high:,}]"
    return ValueRule(f"to be a whole number {words}", lambda x: is_whole(x) and low <= x <= high)


def _one_of(*names: Any) -> ValueRule:
    listed = ", ".join(str(name) for name in names)
    return ValueRule(f"to be one of {listed}", lambda x: not isinstance(x, bool | list | dict) and x in names)


_GROUP = ValueRule("to be 0 or a whole number >= 2", lambda x: is_whole(x) and (x == 0 or x >= 2))
_NAME = ValueRule(
    "to be a name", lambda x: isinstance(x, str) and re.fullmatch(r"[^;|\s][^;|\n]*", x) is not None
)
SOURCE_NAME = re.compile(r"[\w.-]+")
_SOURCES = ValueRule(
    "to give names of sources whole weights, one of them > 0",
    lambda x: (
        isinstance(x, Mapping)
        and all(isinstance(k, str) and SOURCE_NAME.fullmatch(k) for k in x)
        and all(is_whole(v) and v >= 0 for v in x.values())
        and any(x.values())
    ),
)
_QUANTILES = ValueRule(
    "to be two numbers, 0 <= the first < the second <= 1",
    lambda x: (
        isinstance(x, list | tuple) and len(x) == 2 and all(map(is_number, x)) and 0 <= x[0] < x[1] <= 1
    ),
)
_CLUSTERS = ValueRule(
    f"to list clusters from 0 to {N_CLUSTERS - 1}",
    lambda x: (
        isinstance(x, list | tuple) and len(x) > 0 and all(is_whole(i) and 0 <= i < N_CLUSTERS for i in x)
    ),
)
_WEIGHTS = ValueRule(
    f"to give some of {', '.join(MATRICES)} weights within [0, 1]",
    lambda x: (
        isinstance(x, Mapping)
        and set(x) <= set(MATRICES)
        and all(is_number(v) and 0 <= v <= 1 for v in x.values())
    ),
)


def first_metric(unit: Unit) -> str:
    """Default metric of a unit."""
    return searched(metrics_of(unit))[0]


def signed_metrics() -> tuple[str, ...]:
    """Metrics that need only mean gradients, which forward passes can estimate."""
    return tuple(name for name, row in IMPORTANCES.items() if row.gradients == ("mean",))


@cache
def leaves(unit: Unit) -> dict[str, Leaf]:
    """Keys of recipes of a unit, each after those of its conditions."""
    metric = {"metric.name": Leaf(first_metric(unit), _NAME)}
    if unit in BLENDED:
        metric |= _of_blend()
    if unit == "weights":
        fixed = tuple(name for name, row in metrics_of("weights").items() if row.comparison is None)
        free = Condition("metric.name", fixed, negated=True)
        metric["metric.comparison"] = _names("output", "layer", when=(free,))
        metric["metric.group_size"] = Leaf(0, _GROUP, later=True)
    if unit == "structure":
        metric |= _of_structure()
    allocation = _of_allocation(unit) if unit != "blocks" else {}
    repair = Leaf("none", _one_of(*REPAIRS[unit]))
    schedule = _of_schedule(unit) if unit in SCHEDULED else {}
    return {**metric, **_of_calibration(), **allocation, **schedule, "repair": repair}


def _names(*names: Any, when: tuple[Condition, ...] = ()) -> Leaf:
    """One of some names, by default the first."""
    return Leaf(names[0], _one_of(*names), when, names)


_BLEND = Condition("metric.name", (BLEND,))


def _of_blend() -> dict[str, Leaf]:
    mixed, exponents = Condition("metric.order", ("mixed",)), tuple(i / 4 for i in range(9))
    angles = tuple(i / 10 for i in range(1, 10))  # 0 and 1 are the orders first and second
    return {
        "metric.order": _names("none", "first", "second", "mixed", when=(_BLEND,)),
        "metric.angle": Leaf(0.5, _between(0, 1), (_BLEND, mixed), angles, ordered=True),
        "metric.magnitude": Leaf(1, _between(0, 2), (_BLEND,), exponents, ordered=True),
        "metric.activation": Leaf(1, _between(0, 2), (_BLEND,), exponents, ordered=True),
    }


def _of_structure() -> dict[str, Leaf]:
    when = (_BLEND, Condition("metric.reduce", ("output",), negated=True))
    quarters, ones = tuple(i / 4 for i in range(5)), dict.fromkeys(MATRICES, 1)
    return {
        "metric.absolute": _names("element", "vector", when=(_BLEND,)),
        "metric.norm": _names(1, 2, "inf", when=(_BLEND,)),
        "metric.reduce": _names("sum", "mean", "max", "prod", "output", when=(_BLEND,)),
        "metric.weights": Leaf(ones, _WEIGHTS, when, quarters, ordered=True),
        **_parameters("metric.name", UNIT_RECONSTRUCTIONS, later=True),
    }


def _of_calibration() -> dict[str, Leaf]:
    random, loss, clusters = (
        (Condition("calibration.choose", (x,)),) for x in ("random", "loss", "clusters")
    )
    signed = Condition("metric.name", (*signed_metrics(), BLEND)), Condition("metric.order", ("first",))
    return {
        "calibration.sources": Leaf({"calibration": 1}, _SOURCES),
        "calibration.samples": Leaf(32, _whole(1)),
        "calibration.length": Leaf(128, _whole(2)),
        "calibration.choose": _names("random", "loss", "clusters"),
        "calibration.subset": Leaf(0, _whole(0), random),
        "calibration.quantiles": Leaf([0, 0.5], _QUANTILES, loss),
        "calibration.clusters": Leaf([0], _CLUSTERS, clusters, (0, 1)),
        "calibration.gradients": _names("backward", "forward", when=signed),
    }


def _of_allocation(unit: Unit) -> dict[str, Leaf]:
    rows = {name: row for name, row in RULES.items() if unit in row.units}
    rule = Leaf("uniform", _one_of(*rows))
    return {"allocation.rule": rule, **_parameters("allocation.rule", rows)}


def _parameters(named: str, rows: Mapping[str, MethodRow], *, later: bool = False) -> dict[str, Leaf]:
    """Keys of the parameters of methods, beside the key that names the method."""
    found = {}
    for name, row in rows.items():
        for x in row.parameters:
            is_name = isinstance(x.default, str)
            may = _one_of(*x.options) if is_name else _between(x.low, x.high)
            when = (Condition(named, (name,)),)
            found[f"{named.partition('.')[0]}.{x.name}"] = Leaf(
                x.default, may, when, x.options, not is_name, later=later
            )
    return found


def _of_schedule(unit: Unit) -> dict[str, Leaf]:
    """Rounds, and the training in and around them; none of it is written at its default."""
    leaves = {
        "step": Leaf(1, _between(1 / MOST_ROUNDS, 1)),
        "steps": Leaf(1, _whole(1, MOST_ROUNDS)),
        "shape": Leaf("linear", _one_of("linear", "cubic")),
        "before": Leaf(0, _whole(0, MOST_TOKENS)),
        "retrain": Leaf(0, _whole(0, MOST_TOKENS)),
        "after": Leaf(0, _whole(0, MOST_TOKENS)),
        "loss": Leaf("ce", _one_of("ce", "kl")),
        "lr": Leaf(3e-4, _between(1e-8, 1)),
        "penalty": Leaf(0, _between(0, 1e6)),
    }
    left_out = {"weights": ("step",), "blocks": ("penalty",)}.get(unit, ())
    return {f"schedule.{x}": replace(leaf, later=True) for x, leaf in leaves.items() if x not in left_out}
