"""Pruning methods by stage and unit: those of the table, of installed packages, and of one's own.

Packages that add methods import `MethodRow` and `Parameter` from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

from secateur.spaces.method import UNITS, Comparison, Needs, Scope, Stage, Unit
from secateur.spaces.method import MethodRow as MethodRow  # noqa: PLC0414  exported, for other packages
from secateur.spaces.method import Parameter as Parameter  # noqa: PLC0414  likewise
from secateur.spaces.method_table import METHODS
from secateur.spaces.plugins import resolve

OWN_NEEDS: dict[Stage, Needs] = {"metric": "moments", "importance": "moments"}
"""Stages that a path may name a function of, with what such a function is given."""

REGISTERED: dict[str, MethodRow] = {}
"""Rows that this process has registered, by name and by path, see `register_metric`."""

_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def is_path(name: str) -> bool:
    """True of the path of a function, ``package.module:function``."""
    return _PATH.fullmatch(name) is not None and not name.startswith("formula:")


def own_row(name: str, stage: Stage, unit: Unit) -> MethodRow | None:
    """Row of a registered name, or of the function or row at a path; None of any other name.

    The path's module is imported, by the rules of Python's own imports. A function that its module does not register
    is given moments of inputs, and its scores are compared per output.

    Raises:
        ValueError: if there is no such module or function.
    """
    if name in REGISTERED or not is_path(name):
        return REGISTERED.get(name)
    try:
        found = resolve(name)
    except (Exception, SystemExit) as error:  # other people's modules may raise anything
        why = " ".join(str(error).split())
        raise ValueError(
            f"Expected `{stage}` to be a function that can be imported, got {name!r}: {type(error).__name__}: {why} "
            "Install its package, or put its directory on PYTHONPATH."
        ) from error
    if isinstance(found, MethodRow):
        return replace(found, name=name)
    if name in REGISTERED:  # by its module
        return REGISTERED[name]
    if not callable(found):
        raise ValueError(
            f"Expected `{stage}` to be a function or a MethodRow, got {found!r:.40} at {name!r}."
        )
    comparison: Comparison | None = "output" if unit == "weights" else None
    return MethodRow(name, stage, unit, name, "of your own", needs=OWN_NEEDS[stage], comparison=comparison)


class Methods(Mapping[str, MethodRow]):
    """The methods of a stage by name, in the table's order, then those registered; a path names one of one's own.

    Args:
        stage: the stage.
        unit: what they prune, one or several; None: any.
        scope: what they work on at once; None: any. The table's rows without one are of the usual scope, ``""``.
    """

    def __init__(
        self,
        stage: Stage,
        unit: Unit | tuple[Unit, ...] | None = None,
        scope: Scope | Literal[""] | None = None,
    ) -> None:
        self._stage, self._scope = stage, scope
        self._units = get_args(Unit) if unit is None else unit if isinstance(unit, tuple) else (unit,)

    def __getitem__(self, name: str) -> MethodRow:
        row = self._rows.get(name) or (own_row(name, self._stage, self._units[0]) if self._named else None)
        if row is None or row.stage != self._stage or set(self._units).isdisjoint(row.units):
            raise KeyError(name)
        return row

    def __iter__(self) -> Iterator[str]:
        yield from self._rows
        own = {row.name: row for row in REGISTERED.values()} if self._named else {}
        yield from (x for x, row in own.items() if row.stage == self._stage and row.units[0] in self._units)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def _named(self) -> bool:
        """True if one's own functions may be of this kind."""
        return (
            self._stage in OWN_NEEDS and len(self._units) == 1 and self._units[0] in ("weights", "structure")
        )

    @cached_property
    def _rows(self) -> dict[str, MethodRow]:
        return {
            row.name: row
            for row in METHODS.values()
            if row.stage == self._stage
            and not set(self._units).isdisjoint(row.units)
            and (self._scope is None or (row.scope or "") == self._scope)
        }


METRICS = Methods("metric", "weights")
RECONSTRUCTIONS = Methods("reconstruction", "weights", "")
BLOCK_RECONSTRUCTIONS = Methods("reconstruction", "weights", "block")
MODEL_RECONSTRUCTIONS = Methods("reconstruction", "weights", "model")
"""Reconstructions that set one threshold for the whole model under the rule ``global``."""
UPDATES = Methods("reconstruction", "weights")
"""All of them: metrics of recipes that have no scores, and repair by themselves."""
IMPORTANCES = Methods("importance", "structure")
UNIT_RECONSTRUCTIONS = Methods("reconstruction", "structure", "model")
"""Metrics of recipes that choose units and fit what stays by themselves, under the rule ``global``."""
EXPERT_IMPORTANCES = Methods("importance", "experts")
RULES = Methods("allocation")
DEPTH = Methods("depth", "blocks")
MASK_REPAIRS = Methods("repair", "weights")
CUT_REPAIRS = Methods("repair", "structure", "")
EXPERT_REPAIRS = Methods("repair", "experts")
UNIT_REPAIRS = Methods("repair", ("structure", "experts"), "")
"""Those of KV groups and channels, and of experts: one name may be of both."""
STREAM_REPAIRS = Methods("repair", "structure", "model")
DEPTH_REPAIRS = Methods("repair", "blocks")
REPAIRS: dict[Unit, Methods] = {unit: Methods("repair", unit) for unit in UNITS}


def metrics_of(unit: Unit) -> Mapping[str, MethodRow]:
    """Metrics that recipes of a unit may name, beside formulas and the blend."""
    found: dict[str, Mapping[str, MethodRow]] = {
        "weights": _Together(METRICS, UPDATES),
        "structure": _Together(IMPORTANCES, UNIT_RECONSTRUCTIONS),
        "experts": EXPERT_IMPORTANCES,
    }
    return found.get(unit, DEPTH)


def check_protect(unit: Unit, metric: Mapping[str, Any], protect: Sequence[str]) -> None:
    """Raise a ValueError if a recipe's section ``metric`` can't leave projections of these patterns dense."""
    if protect and (row := metrics_of(unit).get(metric["name"])) is not None:
        row.check_protect(metric, protect)


class _Together(Mapping[str, MethodRow]):
    """Several mappings as one, in their order."""

    def __init__(self, *parts: Mapping[str, MethodRow]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> MethodRow:
        part = next((part for part in self._parts if name in part), self._parts[-1])
        return part[name]

    def __iter__(self) -> Iterator[str]:
        return chain(*self._parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))


def has_scores(metric: str) -> bool:
    """False for metrics of recipes that choose what stays by themselves, without scores that rules could compare."""
    choosing = EXPERT_IMPORTANCES.get(metric)
    return not repairs_itself(metric) and (choosing is None or not choosing.scope)


def repairs_itself(metric: str) -> bool:
    """True for metrics of recipes that give weights, too."""
    return metric in UPDATES or metric in UNIT_RECONSTRUCTIONS


def searched(rows: Mapping[str, MethodRow]) -> tuple[str, ...]:
    """Names that a search tries where the settings name none."""
    return tuple(name for name, row in rows.items() if row.searched and not row.origin)
