"""Measurements and fidelities: the vocabulary shared by all packages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

Part = Literal["search", "test", "recovered", "proxy"]
PARTS: tuple[Part, ...] = ("search", "test", "recovered", "proxy")
LOSSES, LEAST_LOSS = ("loss", "kl", "ce", "weighted_kl", "acceptance"), -1e-3  # at least 0, but for rounding
TASK, MARGIN = "task:", "margin:"
"""Prefixes of the values of a task, which the rest names: its accuracy, and the margin of its right answers in nats."""


@dataclass(frozen=True, order=True)
class Fidelity:
    """Amount of data and of light training behind a measurement; only measurements of equal fidelity are compared.

    Fidelities of the parts search and test are nested: the tokens of a smaller one are the first tokens of a larger
    one, and a longer training continues a shorter one.

    Args:
        part: ``"search"`` (for controllers), ``"test"`` (never shown to controllers), ``"recovered"``: trained after
            the search and measured on the test windows; or ``"proxy"``: a closed form over statistics of the
            calibration set, without a forward pass.
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
        """Tokens of the budget that a measurement uses: evaluated and trained on; 0 for a proxy."""
        return 0 if self.part == "proxy" else self.n_tokens + self.n_trained

    @property
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


@dataclass(frozen=True)
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

    def __post_init__(self) -> None:
        if bool(self.values) == (self.infeasible is not None):
            raise ValueError("Expected a measurement with either `values` or a reason in `infeasible`.")
        bad = {name: value for name, value in self.values.items() if not math.isfinite(value)}
        if bad:
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
        return line | {"worker": self.worker, "blocks": self.blocks, "blocks_saved": self.blocks_saved}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Measurement:
        """Inverse of `to_json`; unknown keys are ignored, for forward compatibility.

        Raises:
            KeyError, ValueError: if the line is not a measurement, or one of values out of range.
        """
        found: dict[str, Any] = {"worker": ""}
        for name, value in line.items():
            if name in _TYPES:
                if type(value) not in _TYPES[name] or (name in _COUNTS and not 0 <= value < 2**63):
                    what = _TYPES[name][0].__name__ + " >= 0" * (name in _COUNTS)
                    raise ValueError(f"Expected `{name}` to be {what}, got {str(value)[:40]!r}.")
                found["n_tokens" if name == "tokens" else name] = value
        for name, value in found.get("values", {}).items():
            if type(value) not in (float, int) or (name in LOSSES and value < LEAST_LOSS):
                what = "a number" + " >= 0" * (name in LOSSES)
                raise ValueError(f"Expected `{name}` to be {what}, got {str(value)[:40]!r}.")
        if found.get("values") and "loss" not in found["values"]:
            raise ValueError(f"Expected `loss` in `values`, got {', '.join(found['values'])}.")
        return cls(**found | {"candidate": line["candidate"], "fidelity": Fidelity.parse(line["fidelity"])})


_COUNTS = ("tokens", "seconds", "blocks", "blocks_saved")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("candidate", "fidelity", "worker"), (str,)),
    **dict.fromkeys(("seed", *_COUNTS), (int,)),
    "seconds": (float, int),
    "values": (dict,),
    "infeasible": (str, type(None)),
}
"""Types of a line's values, by key."""
