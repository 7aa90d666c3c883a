"""Measurements and fidelities: the vocabulary shared by all packages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Literal

Part = Literal["search", "test", "recovered", "proxy", "gradient"]
PARTS: tuple[Part, ...] = ("search", "test", "recovered", "proxy", "gradient")
SEARCHED: tuple[Part, ...] = ("search", "proxy", "gradient")
"""Parts that a search spends its budget on."""

PASSES = {"proxy": 0, "gradient": 3}
"""Forward passes that a measurement of a part costs, if it is not one."""

LEAST = -1e-3  # of a loss or a cost: 0, but for rounding
TASK, MARGIN = "task:", "margin:"
"""Prefixes of the values of a task, which the rest names: its accuracy, and the margin of its right answers in nats."""


@dataclass(frozen=True, order=True)
class Fidelity:
    """Amount of data and of light training behind a measurement; only measurements of equal fidelity are compared.

    Fidelities of the parts search and test are nested: the tokens of a smaller one are the first tokens of a larger
    one, and a longer training continues a shorter one.

    Args:
        part: ``"search"`` (for controllers), ``"test"`` (never shown to controllers), ``"recovered"``: trained after
            the search and measured on the test windows; ``"proxy"``: a closed form over statistics of the
            calibration set, without a forward pass; or ``"gradient"``: a forward and a backward pass over windows of
            the search part, for `Effects`.
        n_tokens: evaluated tokens, > 0; of ``"recovered"`` the training tokens, repetitions included, so that longer
            training is another fidelity; of ``"proxy"`` the tokens of the statistics.
        n_trained: tokens of light training before the measurement, >= 0.

    Raises:
        ValueError: on an unknown part or a number of tokens that is out of range.
    """

    part: Part
    n_tokens: int
    n_trained: int = 0

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"Expected `part` to be one of {', '.join(PARTS)}, got {self.part!r}.")
        if self.n_tokens <= 0:
            raise ValueError(f"Expected `n_tokens` > 0, got {self.n_tokens}.")
        if self.n_trained < 0:
            raise ValueError(f"Expected `n_trained` >= 0, got {self.n_trained}.")

    @property
    def n_evaluations(self) -> int:
        """Evaluations of the budget that a measurement uses: 1, or 0 for a proxy."""
        return 0 if self.part == "proxy" else 1

    @property
    def total_tokens(self) -> int:
        """Tokens of the budget that a measurement uses: evaluated and trained on; 0 for a proxy.

        A backward pass counts as two forward passes.
        """
        return PASSES.get(self.part, 1) * (self.n_tokens + self.n_trained)

    @cached_property
    def text(self) -> str:
        """Canonical text, e.g. ``search:2048`` or ``search:2048+trained:8192``."""
        return f"{self.part}:{self.n_tokens}" + (f"+trained:{self.n_trained}" if self.n_trained else "")

    @classmethod
    @lru_cache(maxsize=256)  # a study has few, and repeats one in each line
    def parse(cls, text: str) -> Fidelity:
        """Inverse of `text`.

        Raises:
            ValueError: if the text is not a fidelity.
        """
        found = re.fullmatch(r"([a-z]+):(\d+)(?:\+trained:(\d+))?", text, re.ASCII)
        if found is None:
            raise ValueError(f"Expected a fidelity such as 'search:2048', got {text!r}.")
        return cls(found[1], int(found[2]), int(found[3] or 0))  # type: ignore[arg-type]  # checked when made


Table = tuple[tuple[float, ...], ...]
"""A row of numbers a slot, a number an option."""


@dataclass(frozen=True)
class Effects:
    """Foretold changes of the loss when one slot of a candidate is switched to another option, in nats a token.

    Args:
        first: of first order in the change of weights.
        second: of second order, >= 0.
    """

    first: Table
    second: Table

    def to_json(self) -> dict[str, Any]:
        """Plain dict of lists."""
        return {name: [list(row) for row in table] for name, table in vars(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Effects:
        """Inverse of `to_json`.

        Raises:
            ValueError: unless both are finite tables of one shape.
        """
        first, second = _table(value.get("first")), _table(value.get("second"))
        if [len(row) for row in first] != [len(row) for row in second]:
            raise ValueError("Expected `effects` with two tables of one shape, got others.")
        return cls(first, second)


def _table(value: Any) -> Table:
    """Lists of finite numbers as a table."""
    rows: list[Any] = value if isinstance(value, list) else [None]
    for row in rows:
        if not isinstance(row, list) or not all(type(x) in (float, int) and math.isfinite(x) for x in row):
            raise ValueError(
                f"Expected `effects` with tables of finite numbers, got {str(row)[:40]!r} in one."
            )
    return tuple(tuple(map(float, row)) for row in rows)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Values of one candidate at one fidelity, or the reason why it is infeasible.

    Args:
        candidate: the candidate's canonical text.
        fidelity: of the values.
        values: finite numbers by name: ``loss`` (the search's objective), ``kl`` and ``ce`` in nats per token, and
            the exact costs (``params``, ``size_bytes``, ...). Empty if infeasible.
        infeasible: reason, or None.
        seed: the study's seed.
        n_tokens: tokens evaluated and trained on (nominal: shared prefixes and continued trainings are not
            subtracted).
        seconds: wall time; a batch's time is divided among its candidates.
        worker: name of the worker.
        blocks: model blocks computed (per pass over the data, summed over data batches).
        blocks_saved: model blocks shared with other candidates of the batch, hence not computed.
        effects: of the candidate's slots, at the part ``gradient``.
        windows: loss of each window of the part ``test``, whose mean is ``loss``; empty where it was not kept.
        started: time of day when the work began, in seconds since 1970 by the driver's clock; 0 where not known. The
            measurements of a batch by one worker begin and end together.
        ended: likewise, when it was done.

    Raises:
        ValueError: if there are neither values nor a reason, both, or a value that is not finite.
    """

    candidate: str
    fidelity: Fidelity
    values: Mapping[str, float] = field(default_factory=dict)
    infeasible: str | None = None
    seed: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    worker: str = "local"
    blocks: int = 0
    blocks_saved: int = 0
    effects: Effects | None = None
    windows: tuple[float, ...] = ()
    started: float = field(default=0.0, compare=False)
    ended: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if bool(self.values) == (self.infeasible is not None):
            raise ValueError("Expected a measurement with either `values` or a reason in `infeasible`.")
        if not all(map(math.isfinite, self.values.values())):
            bad = {name: value for name, value in self.values.items() if not math.isfinite(value)}
            raise ValueError(f"Expected finite `values`, got {bad}. Give the reason in `infeasible` instead.")
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by plain values, since the read-only view of `values` can't be pickled."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)} | {"values": dict(self.values)}
        return Measurement, tuple(plain.values())

    @property
    def key(self) -> tuple[str, str]:
        """Identity in a study, which holds at most one measurement a key."""
        return self.candidate, self.fidelity.text

    def to_json(self) -> dict[str, Any]:
        """Plain dict for one line of ``measurements.jsonl``."""
        line: dict[str, Any] = {"candidate": self.candidate, "fidelity": self.fidelity.text}
        if self.infeasible is None:
            line["values"] = dict(self.values)
        else:
            line["infeasible"] = self.infeasible
        line |= {"seed": self.seed, "tokens": self.n_tokens, "seconds": round(self.seconds, 6)}
        line |= {"worker": self.worker, "blocks": self.blocks, "blocks_saved": self.blocks_saved}
        if self.windows:
            line["windows"] = list(self.windows)
        if self.ended:
            line |= {"started": round(self.started, 3), "ended": round(self.ended, 3)}
        return line if self.effects is None else line | {"effects": self.effects.to_json()}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Measurement:
        """Inverse of `to_json`; unknown keys are ignored, for forward compatibility.

        Raises:
            KeyError, ValueError: if the line is not a measurement, or one of values out of range.
        """
        get, values = line.get, line.get("values", {})
        n_tokens, seconds, blocks, saved = (
            get("tokens", 0),
            get("seconds", 0.0),
            get("blocks", 0),
            get("blocks_saved", 0),
        )
        wrong = _of_wrong_type(tuple(line), tuple(map(type, line.values())))
        if wrong is None and not (
            0 <= n_tokens < _END and 0 <= seconds < _END and 0 <= blocks < _END and 0 <= saved < _END
        ):
            wrong = next(name for name in _COUNTS if not 0 <= get(name, 0) < _END)
        if wrong is not None:
            what = _TYPES[wrong][0].__name__ + " >= 0" * (wrong in _COUNTS)
            raise ValueError(f"Expected `{wrong}` to be {what}, got {str(line[wrong])[:40]!r}.")
        plain = _all_numbers(tuple(map(type, values.values()))) and values.get("sparsity", 0) <= 1
        for name, value in () if plain and min(values.values()) >= LEAST else values.items():
            is_least = type(value) in _NUMBERS and (value >= LEAST or name.startswith(_ANY))
            if not is_least or (value > 1 and name == "sparsity"):
                what = "a number" + " >= 0" * (not name.startswith(_ANY)) + " and <= 1" * (name == "sparsity")
                raise ValueError(f"Expected `{name}` to be {what}, got {str(value)[:40]!r}.")
        if values and "loss" not in values:
            raise ValueError(f"Expected `loss` in `values`, got {', '.join(values)}.")
        effects = Effects.from_json(line["effects"]) if "effects" in line else None
        windows = tuple(get("windows", ()))
        if not all(type(x) in _NUMBERS and LEAST <= x < math.inf for x in windows):
            raise ValueError(f"Expected `windows` with finite losses, got {str(line['windows'])[:40]!r}.")
        started, ended = get("started", 0.0), get("ended", 0.0)
        if not 0 <= started <= ended < _LATEST:
            raise ValueError(f"Expected `started` <= `ended` in seconds since 1970, got {started}, {ended}.")
        fidelity, reason = Fidelity.parse(line["fidelity"]), get("infeasible")
        return cls(
            line["candidate"],
            fidelity,
            values,
            reason,
            get("seed", 0),
            n_tokens,
            seconds,
            get("worker", ""),
            blocks,
            saved,
            effects,
            windows,
            started,
            ended,
        )


_NUMBERS, _END = {float, int}, 2**63
_LATEST = 253_402_214_400.0  # the last day of the year 9999, in seconds since 1970
_ANY = (TASK, MARGIN)  # of values that may be negative
_COUNTS = ("tokens", "seconds", "blocks", "blocks_saved")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("candidate", "fidelity", "worker"), (str,)),
    **dict.fromkeys(("seed", *_COUNTS), (int,)),
    "seconds": (float, int),
    "values": (dict,),
    "infeasible": (str, type(None)),
    "effects": (dict,),
    "windows": (list,),
    "started": (float, int),
    "ended": (float, int),
}
"""Types of a line's values, by key."""


@lru_cache(maxsize=64)  # the lines of a study are of few kinds
def _all_numbers(types: tuple[type, ...]) -> bool:
    """True if there are values, all of which are numbers."""
    return bool(types) and _NUMBERS.issuperset(types)


@lru_cache(maxsize=64)
def _of_wrong_type(names: tuple[str, ...], types: tuple[type, ...]) -> str | None:
    """The first key of a line whose value has another type; None if there is none."""
    pairs = zip(names, types, strict=True)
    return next((name for name, kind in pairs if kind not in _TYPES.get(name, (kind,))), None)


def perplexity_of(cross_entropy: float) -> float:
    """Perplexity of a cross-entropy in nats a token, at most about 1e304: what fits a float."""
    return math.exp(min(cross_entropy, 700.0))
