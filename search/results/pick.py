"""Choice of one trial of a study by bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.results.front import comparable
from secateur.spaces.latency import at_batch
from secateur.spaces.limited_text import cut
from secateur.spaces.measurement import Fidelity
from secateur.spaces.names import nearest

# A target of 0.6 is met to within one level step, so a trial at 0.5983 is a 60 % one.
SPARSITY_TOLERANCE = 0.005

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {"": 1.0, "b": 1.0, "k": 1e3, "m": 1e6, "g": 1e9} | {
    f"{prefix}{b}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for b, base in (("b", 1000.0), ("ib", 1024.0))
}

_MILLISECONDS = {"": 1.0, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class BoundKind:
    """Kind of bound.

    Args:
        value: name of the measured value.
        units: factors by unit, in lower case.
        at_least: True if the value must not be below the bound, False if it must not be above.
        tolerance: by which a value may be below.
        example: for errors.
    """

    value: str
    units: Mapping[str, float]
    at_least: bool = False
    tolerance: float = 0.0
    example: str = "90M"

    @property
    def has_batch(self) -> bool:
        """True of latencies, which a run may have at several batch sizes."""
        return self.value.startswith("latency_")


# By the name of the option on the command line.
BOUND_KINDS: dict[str, BoundKind] = {
    "max-params": BoundKind("params", _COUNTS),
    "max-size": BoundKind("size_bytes", _BYTES, example="180MB"),
    "max-macs": BoundKind("macs", _COUNTS, example="60M"),
    "max-kv": BoundKind("kv_bytes", _BYTES, example="12KiB"),
    "max-latency": BoundKind("latency_decode", _MILLISECONDS, example="30ms"),
    "max-prefill": BoundKind("latency_prefill", _MILLISECONDS, example="300ms"),
    "min-acceptance": BoundKind("acceptance", {"": 1.0}, at_least=True, example="0.8"),
    "sparsity": BoundKind("sparsity", {"": 1.0}, at_least=True, tolerance=SPARSITY_TOLERANCE, example="0.6"),
}


@dataclass(frozen=True)
class Bound:
    """Limit that a picked trial must meet.

    Args:
        name: key of `BOUND_KINDS`.
        limit: in the value's unit, or a fraction of the dense model's value.
        relative: True for a fraction.
        text: as given.
        batch: size at which a latency is limited; None: the first of the run's.
    """

    name: str
    limit: float
    relative: bool
    text: str
    batch: int | None = None

    @property
    def value(self) -> str:
        """Name of the limited value."""
        return at_batch(BOUND_KINDS[self.name].value, self.batch)

    def where_first_is(self, batch: int) -> Bound:
        """The same bound for values whose names have no batch size where it is this one."""
        return replace(self, batch=None) if self.batch == batch else self

    @classmethod
    def parse(cls, name: str, text: str) -> Bound:
        """Bound from a text such as ``90e6``, ``90M``, ``180MB``, ``512KiB``, or ``0.7x`` of the dense model.

        Units are powers of 1000, with an ``i`` of 1024; their case doesn't matter. A latency's limit may end with a
        batch size, ``30ms@8``.

        Raises:
            UsageError: if the name is unknown or the text is not a limit.
        """
        if name not in BOUND_KINDS:
            raise UsageError(
                f"Expected a known bound, got {cut(repr(name), 60)}.{nearest(name, BOUND_KINDS)}"
            )
        kind = BOUND_KINDS[name]
        at = r"(?:@\s*([1-9][0-9]{0,8})\s*)?" if kind.has_batch else "()"
        found = re.fullmatch(rf"\s*([0-9.]+(?:e[-+]?[0-9]+)?)\s*([a-z]*)\s*{at}", text.lower())
        unit = found[2] if found else ""
        relative = unit == "x" and not kind.at_least
        try:
            limit = float(found[1] if found else "") * (1.0 if relative else kind.units[unit])
        except (ValueError, KeyError):
            limit = math.nan
        if not math.isfinite(limit) or (kind.at_least and limit > 1):
            ask = f"{kind.example}" + ("" if kind.at_least else " or 0.7x (of the dense model)")
            ask += f", or {kind.example}@8 (at a batch size)" if kind.has_batch else ""
            raise UsageError(f"Expected `{name}` such as {ask}, got {cut(repr(text), 60)}.")
        batch = int(found[3]) if found and found[3] else None
        return cls(name, limit, relative, text.strip(), batch)

    def excess(self, trial: Trial, dense: Trial | None) -> float:
        """Distance of the trial from the bound as a fraction of it; 0 if it meets it."""
        kind = BOUND_KINDS[self.name]
        value, limit = self._value(trial), self.absolute(dense)
        if kind.at_least:
            limit -= kind.tolerance
            value, limit = -value, -limit
        return max(0.0, value - limit) / (abs(limit) or 1.0)

    def absolute(self, dense: Trial | None) -> float:
        """Limit in the value's unit.

        Raises:
            UsageError: if the bound is relative and the dense model was not measured.
        """
        if not self.relative:
            return self.limit
        if dense is None:
            raise UsageError(f"Expected a measured dense model for `{self.name}` {self.text}, got none.")
        return self.limit * self._value(dense)

    def _value(self, trial: Trial) -> float:
        values = trial.measurement.values
        name = self.value
        if name not in values:
            raise UsageError(
                f"Expected trials with `{name}` for `{self.name}`, got a study without it. "
                f"Use a bound on one of: {', '.join(values)}."
            )
        return values[name]


def parse_bounds(texts: Mapping[str, str | None]) -> tuple[Bound, ...]:
    """Bounds by name, without those that are None.

    Raises:
        UsageError: if one is not valid, or if there is none.
    """
    bounds = tuple(Bound.parse(name, text) for name, text in texts.items() if text is not None)
    if not bounds:
        raise UsageError(f"Expected a bound to pick by, got none. Known: {', '.join(BOUND_KINDS)}.")
    return bounds


def pick(
    trials: Iterable[Trial],
    bounds: Sequence[Bound],
    dense: str | None = None,
    fidelity: Fidelity | None = None,
) -> Trial:
    """Trial with the lowest loss within all bounds, at one fidelity.

    A bound on sparsity is met to within `SPARSITY_TOLERANCE`.

    Args:
        dense: canonical text of the dense model, for relative bounds.
        fidelity: None for the largest search fidelity among the trials.

    Returns:
        Of equal losses the trial with the lowest number.

    Raises:
        UsageError: if no trial meets the bounds; the nearest one is named.
    """
    among = comparable(trials, fidelity)
    if not among:
        raise UsageError("Expected a study with feasible trials, got none. Let its search go on first.")
    reference = next((t for t in among if t.measurement.candidate == dense), None)
    excesses = [[bound.excess(trial, reference) for bound in bounds] for trial in among]
    within = [trial for trial, excess in zip(among, excesses, strict=True) if not any(excess)]
    if within:
        return min(within, key=lambda trial: (trial.measurement.values["loss"], trial.number))
    _, near, missed = min(
        (max(excess), i, bounds[excess.index(max(excess))]) for i, excess in enumerate(excesses)
    )
    asked = ", ".join(f"{bound.name} {bound.text}" for bound in bounds)
    value = missed.value
    raise UsageError(
        f"Expected a trial within {asked}, got none among {len(among)}. The nearest is trial "
        f"{among[near].number} with {value} {among[near].measurement.values[value]:,.10g}, where "
        f"{missed.absolute(reference):,.10g} is asked for. Loosen the bound, or search at another target."
    )


def pick_number(trials: Sequence[Trial], number: int) -> Trial:
    """Trial with this number.

    Raises:
        UsageError: if there is none, if it is infeasible, or if it is a recovered model.
    """
    if not 0 <= number < len(trials):
        got = f"trials 0 to {len(trials) - 1}" if trials else "a study without trials"
        raise UsageError(f"Expected trial {number}, got {got}. List them with `front`.")
    trial = trials[number]
    if trial.measurement.infeasible is not None:
        raise UsageError(
            f"Expected a feasible trial, got trial {number}: {trial.measurement.infeasible}. Pick another."
        )
    if trial.measurement.fidelity.part == "recovered":
        raise UsageError(
            f"Expected a trial of the search, got trial {number}, a recovered model. Use the one in recovered/ of "
            f"the run's directory."
        )
    return trial
