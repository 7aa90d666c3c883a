"""Tree of conditional choices of a space of recipes, with their options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.spaces.method import Unit
from secateur.spaces.methods import (
    MODEL_RECONSTRUCTIONS,
    RULES,
    UNIT_RECONSTRUCTIONS,
    has_scores,
    repairs_itself,
)
from secateur.spaces.recipe.form import (
    OWN_THRESHOLD,
    OWN_VALUES,
    completed,
    flattened,
    nested,
)
from secateur.spaces.recipe.groups import GROUP_SIZE, beside_groups
from secateur.spaces.recipe.keys import MATRICES, N_ATTENTION, N_CLUSTERS, Condition, is_number, leaves
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.recipe.schedule import (
    OF_TRAINING,
    looks_at_dense,
    prunes_at_once,
    repair_goes_on,
    trains,
)
from secateur.spaces.space import IntParameter, Requirement

Subspace = Literal["calibration", "metric", "allocation", "repair"]
Items = dict[str, Any]
"""Applicable values by ``section.key``, or ``section.key.item`` for keys with several values."""

SCHEDULE = "schedule"
"""Section that is searched where there are options for it."""

SOURCES, CLUSTERS, WEIGHTS = "calibration.sources", "calibration.clusters", "metric.weights"


@dataclass(frozen=True)
class Choice:
    """One choice of a recipe.

    Args:
        path: of the item.
        options: its values, at least two.
        ordered: neighbouring options mean similar recipes.
        when: conditions under which its key applies.
    """

    path: str
    options: tuple[Any, ...]
    ordered: bool
    when: tuple[Condition, ...]

    def position(self, value: Any) -> int | None:
        """Position of a value's option, or of the nearest one of an ordered choice; None if there is none."""
        if not self.ordered and value not in self.options:
            return None
        return self.options.index(nearest(self.options, value, ordered=self.ordered))


def nearest(options: Sequence[Any], value: Any, *, ordered: bool) -> Any:
    """Option nearest to a value; of unordered options the value itself, or the first one."""
    if value in options or not (ordered and is_number(value)):
        return value if value in options else options[0]
    return min(options, key=lambda option: abs(option - value))


ROUNDS = ("schedule.step", "schedule.steps")

Fill = Callable[[Choice], Any]
"""Function that gives the value of a newly applicable choice."""


class Tree:
    """Choices of a space, in topological order of their conditions.

    Args:
        sources: names of calibration sources.
        start: published recipe for values that are not searched.
        search: sections that are searched, and keys.
        options: by key, values of each of its items, and whether they are ordered; a single value is fixed.
    """

    def __init__(
        self,
        unit: Unit,
        sources: Sequence[str],
        start: str,
        search: Collection[str],
        options: Mapping[str, tuple[Sequence[Any], bool]],
    ) -> None:
        self._unit, self._leaves = unit, leaves(unit)
        self._items = {SOURCES: tuple(sources), CLUSTERS: range(N_CLUSTERS), WEIGHTS: MATRICES}
        defaults = expanded({key: leaf.default for key, leaf in self._leaves.items()}, sources)
        defaults |= dict.fromkeys(self._paths(SOURCES), 1)
        base, offered = items_of_known(start), dict[str, Choice]()
        for key, leaf in self._leaves.items():
            values, ordered = options[key]
            section = key.partition(".")[0]
            is_searched = section in search or key in search
            for path in self._paths(key):
                if section == "calibration":
                    base[path] = nearest(values, defaults[path], ordered=ordered)
                if is_searched and len(values) == 1:
                    base[path] = values[0]
                elif is_searched and values:
                    offered[path] = Choice(path, tuple(values), ordered, leaf.when)

        def can_hold(condition: Condition) -> bool:
            fixed = [base[condition.path]] if condition.path in base else None
            values = offered[condition.path].options if condition.path in offered else fixed
            return values is None or any(map(condition.holds, values))

        self._base = {**defaults, **base}
        self._choices = {path: c for path, c in offered.items() if all(map(can_hold, c.when))}
        self.group_size: int | None = (
            base[GROUP_SIZE] if len(options.get(GROUP_SIZE, ((), False))[0]) == 1 else None
        )
        """Size of the groups that all recipes have that can; None: it is a choice, or that of the start."""
        weights = self._paths(WEIGHTS)
        groups = (self._paths(SOURCES), self._paths(CLUSTERS), weights[:N_ATTENTION], weights[N_ATTENTION:])
        self._others = {group[-1]: group[:-1] for group in groups}

    def _scheduled(self, path: str, value: Any, before: Items) -> Any:
        """The value, or another one of schedules and repairs that contradict earlier items, see `check_schedule`."""
        if path == "repair":
            return value if repair_goes_on(self._unit, before, value) else "none"
        unfit = path.startswith(f"{SCHEDULE}.") and _contradicts(path, before)
        return self._leaves[path].default if unfit else value

    @property
    def has_schedules(self) -> bool:
        """True if keys of schedules are searched."""
        return any(path.startswith(f"{SCHEDULE}.") for path in self._choices)

    @property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(self._choices.values())

    def active(self, items: Items) -> list[Choice]:
        return [choice for path, choice in self._choices.items() if path in items]

    def completed(self, items: Mapping[str, Any], fill: Fill) -> Items:
        """Applicable items, with missing ones from `fill` or the base.

        An item that contradicts an earlier one is replaced, see `form.check_together`.
        """
        found: Items = {}
        for key, leaf in self._leaves.items():
            if leaf.applies(found):
                for path in self._paths(key):
                    value = beside_groups(path, self._value(path, items, fill), found)
                    value = self._scheduled(path, value, found)
                    found[path] = self._allowed(path, value, found)
        return found

    def default(self, choice: Choice) -> Any:
        return nearest(choice.options, self._base[choice.path], ordered=choice.ordered)

    def parameters(self) -> tuple[IntParameter, ...]:
        """Choices as integer parameters, by the positions of options."""
        return tuple(
            IntParameter(c.path, 0, len(c.options) - 1, categorical=not c.ordered, when=self._requirements(c))
            for c in self.choices
        )

    def _requirements(self, choice: Choice) -> tuple[Requirement, ...]:
        """Conditions on other choices."""
        found = []
        for condition in choice.when:
            options = self._choices[condition.path].options if condition.path in self._choices else ()
            holding = frozenset(i for i, x in enumerate(options) if condition.holds(x))
            if len(holding) < len(options):
                found.append(Requirement(condition.path, holding))
        return tuple(found)

    def _paths(self, key: str) -> list[str]:
        return [f"{key}.{item}" for item in self._items[key]] if key in self._items else [key]

    def _value(self, path: str, items: Mapping[str, Any], fill: Fill) -> Any:
        if path in items:
            return items[path]
        if path in self._choices:
            return fill(self._choices[path])
        return self._base[path]

    def _allowed(self, path: str, value: Any, before: Items) -> Any:
        """The value, or another one if it contradicts earlier items."""
        if path in self._others:  # the last of some that may not all be 0
            return value or int(not any(before[other] for other in self._others[path]))
        if path == "metric.activation" and before["metric.order"] == "none":
            return value or int(not before["metric.magnitude"])
        metric = before.get("metric.name")
        if metric is None or has_scores(metric):
            return value
        if metric in UNIT_RECONSTRUCTIONS:
            own = {"allocation.rule": OWN_THRESHOLD, "repair": "none", **OWN_VALUES}
            return own.get(path, value)
        if metric in MODEL_RECONSTRUCTIONS and before.get("allocation.rule", value) == OWN_THRESHOLD:
            return "none" if path == "repair" else OWN_VALUES.get(path, value)
        if path == "allocation.rule" and "scores" in RULES[value].evidence:
            rules = self._choices[path].options if path in self._choices else ()
            return next((rule for rule in rules if "scores" not in RULES[rule].evidence), "uniform")
        return "none" if path == "repair" and repairs_itself(metric) else value


def _contradicts(path: str, before: Items) -> bool:
    """True for a key of schedules that must be at its default beside these items, see `check_schedule`."""
    metric, rule = before["metric.name"], before.get("allocation.rule", "uniform")
    return bool(
        prunes_at_once(metric)
        or (path in ROUNDS and looks_at_dense(rule))
        or (path == "schedule.steps" and before.get("schedule.step", 1) < 1)
        or (path in OF_TRAINING and not trains(before))
        or (path == "schedule.shape" and before["schedule.steps"] == 1)
        or (path == "schedule.penalty" and (repairs_itself(metric) or not before["schedule.retrain"]))
    )


def items_of(plain: Mapping[str, Any], sources: Sequence[str]) -> Items:
    """Single values of a complete plain form, see `form.completed`, and the defaults that it leaves out."""
    later = {key: leaf.default for key, leaf in leaves(plain["unit"]).items() if leaf.later}
    return expanded(later | flattened(plain), sources)


def items_of_known(name: str) -> Items:
    """Items of a published recipe's metric, allocation and repair, without calibration data."""
    row = KNOWN[name]
    items = items_of(completed({"unit": row.unit, "sparsity": 0.5, **row.form}), ())
    return {path: value for path, value in items.items() if not path.startswith("calibration.")}


def expanded(flat: Mapping[str, Any], sources: Sequence[str]) -> Items:
    """Items of keys with several values; missing sources have weight 0."""
    found: Items = {}
    for key, value in flat.items():
        if key == SOURCES:
            value = dict.fromkeys(sources, 0) | value
        elif key == CLUSTERS:
            value = {index: int(index in value) for index in range(N_CLUSTERS)}
        if isinstance(value, Mapping):
            found |= {f"{key}.{item}": held for item, held in value.items()}
        else:
            found[key] = tuple(value) if isinstance(value, list) else value
    return found


def plain_of(items: Items, unit: Unit, sparsity: float) -> dict[str, Any]:
    """Plain form of items; inverse of `items_of`."""
    flat: dict[str, Any] = {}
    for path, value in items.items():
        key, _, item = path.rpartition(".")
        if key in (SOURCES, WEIGHTS):
            flat.setdefault(key, {})[item] = value
        elif key == CLUSTERS:
            flat.setdefault(key, [])
            flat[key] += [int(item)] if value else []
        else:
            flat[path] = value
    return {"unit": unit, "sparsity": sparsity, **nested(flat)}
