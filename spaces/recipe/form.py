"""Plain form of a recipe, as in YAML files: checks and defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from secateur.spaces.formulas.metric import formula_of, metric_of
from secateur.spaces.method import UNITS
from secateur.spaces.methods import (
    MODEL_RECONSTRUCTIONS,
    RULES,
    UNIT_RECONSTRUCTIONS,
    has_scores,
    repairs_itself,
)
from secateur.spaces.names import did_you_mean
from secateur.spaces.recipe.groups import check_groups
from secateur.spaces.recipe.keys import MATRICES, N_ATTENTION, Condition, Flat, is_number, leaves
from secateur.spaces.recipe.schedule import check_schedule

_SECTIONS = ("calibration", "metric", "allocation", "schedule")
_SHORT = {"metric": "name", "allocation": "rule"}

OWN_THRESHOLD = "global"
"""Rule under which methods of the model at once spread the zeros by themselves."""

OWN_VALUES: dict[str, Any] = {f"allocation.{x.name}": x.default for x in RULES[OWN_THRESHOLD].parameters}
"""Values of its parameters there."""


def completed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Complete plain form, with defaults for missing keys, in order; a new mapping.

    ``metric: wanda`` and ``allocation: uniform`` are short for their names. Whole numbers become ``int``, others have
    at most 10 digits; weights of sources are in lowest terms.

    Raises:
        ValueError: if a key is unknown or does not apply, a value is not allowed, or keys contradict each other.
    """
    unit = plain.get("unit")
    if unit not in UNITS:
        raise ValueError(f"Expected `unit` to be one of {', '.join(UNITS)}, got {unit!r}.")
    sparsity: Any = plain.get("sparsity")
    if not is_number(sparsity) or not 0 < sparsity < 1:
        raise ValueError(f"Expected `sparsity` within (0, 1), got {sparsity!r}. It is the share to remove.")
    known, given = leaves(unit), flattened(plain)
    for path in given:
        if path not in known:
            hint = did_you_mean(path, known) or f" Known are {', '.join(known)}."
            raise ValueError(f"Expected known keys of a recipe of {unit}, got `{path}`.{hint}")
    flat: dict[str, Any] = {}
    for path, leaf in known.items():
        value = given.get(path, leaf.default)
        if leaf.applies(flat):
            if not leaf.rule.holds(value):
                raise ValueError(f"Expected `{path}` {leaf.rule.words}, got {value!r}.")
            if not leaf.later or value != leaf.default:
                flat[path] = _canonical(path, value)
        elif value != leaf.default:
            unmet = "; ".join(
                _words(c, flat) for c in leaf.when if c.path in flat and not c.holds(flat[c.path])
            )
            raise ValueError(f"Expected `{path}` only where it applies ({unmet}), got {value!r}. Remove it.")
    check_together(flat)
    check_schedule(unit, flat)
    check_groups(sparsity, flat)
    return {"unit": unit, "sparsity": _canonical("", sparsity)} | nested(flat)


def check_together(flat: Flat) -> None:
    """Check that keys do not contradict each other."""
    metric, repair = flat["metric.name"], flat["repair"]
    if repairs_itself(metric) and repair != "none":
        raise ValueError(
            f"Expected `repair: none` with the metric {metric}, which repairs by itself, got {repair!r}."
        )
    rule = flat.get("allocation.rule", "uniform")
    if metric in UNIT_RECONSTRUCTIONS and (
        rule != OWN_THRESHOLD or any(x.startswith("schedule.") for x in flat)
    ):
        raise ValueError(
            f"Expected the rule {OWN_THRESHOLD} and no `schedule` with the metric {metric}, which chooses by itself, "
            f"got {rule!r}. Say `allocation: {OWN_THRESHOLD}`."
        )
    if metric in {**MODEL_RECONSTRUCTIONS, **UNIT_RECONSTRUCTIONS} and rule == OWN_THRESHOLD:
        own = {path: flat[path] for path, value in OWN_VALUES.items() if flat[path] != value}
        if own:
            raise ValueError(
                f"Expected the defaults of the rule {rule} with the metric {metric}, whose threshold is its own, got "
                f"{own}. Remove them."
            )
    elif not has_scores(metric) and "scores" in RULES[rule].evidence:
        raise ValueError(
            f"Expected a rule that needs no scores with the metric {metric}, which has none, got {rule!r}. Use "
            f"uniform or another one."
        )
    blocks, hidden = flat.get("metric.blocks", 0), flat.get("metric.hidden", 0)
    if blocks + hidden > 1:
        raise ValueError(
            f"Expected `blocks` and `hidden` that sum to at most 1 for the metric {metric}, got {blocks:g} and "
            f"{hidden:g}. Lower one."
        )
    if flat.get("metric.order") == "none" and flat["metric.magnitude"] == flat["metric.activation"] == 0:
        raise ValueError(
            "Expected `metric.magnitude` or `metric.activation` > 0 where `metric.order` is none, got 0 and 0: all "
            "scores would be equal."
        )
    weights = flat.get("metric.weights")
    for matrices in (MATRICES[:N_ATTENTION], MATRICES[N_ATTENTION:]):
        if weights is not None and not any(weights[name] for name in matrices):
            raise ValueError(
                f"Expected one of `metric.weights` of {', '.join(matrices)} > 0, got 0 for all: their units would "
                f"all score the same."
            )


def nested(flat: Flat) -> dict[str, Any]:
    """Nested sections, in the order of the plain form."""
    found = {
        section: {p.partition(".")[2]: v for p, v in flat.items() if p.startswith(f"{section}.")}
        for section in _SECTIONS
    }
    return {section: held for section, held in found.items() if held} | {"repair": flat["repair"]}


def flattened(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Values by ``section.key``, without ``unit`` and ``sparsity``; unchecked."""
    found: dict[str, Any] = {}
    for section, held in plain.items():
        if section in ("unit", "sparsity"):
            continue
        if section in _SHORT and isinstance(held, str):
            found[f"{section}.{_SHORT[section]}"] = held
        elif section in _SECTIONS and isinstance(held, Mapping):
            found |= {f"{section}.{key}": value for key, value in held.items()}
        elif section in _SECTIONS:
            raise ValueError(f"Expected `{section}` to hold keys, got {held!r}.")
        else:
            found[section] = held
    return found


def _canonical(path: str, value: Any) -> Any:
    """Canonical form of a value."""
    if path == "calibration.sources":
        whole = {name: int(weight) for name, weight in sorted(value.items()) if weight}
        common = math.gcd(*whole.values())
        return {name: weight // common for name, weight in whole.items()}
    if path == "metric.weights":
        return {name: _canonical("", value.get(name, 1)) for name in MATRICES}
    if path == "calibration.clusters":
        return sorted({int(index) for index in value})
    if path == "metric.name":
        tree = formula_of(value)
        return value if tree is None else metric_of(tree)
    if isinstance(value, list | tuple):
        return [_canonical("", held) for held in value]
    if not is_number(value):
        return value
    rounded = float(f"{value:.10g}")
    return int(rounded) if rounded.is_integer() else rounded


def _words(condition: Condition, flat: Flat) -> str:
    values = ", ".join(str(value) for value in condition.values)
    return (
        f"`{condition.path}` {'none' if condition.negated else 'one'} of {values}, not {flat[condition.path]}"
    )
