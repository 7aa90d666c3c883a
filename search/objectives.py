"""Objectives of a search: names, units, directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from secateur.search.controller import Trial
from secateur.search.losses import loss_of
from secateur.spaces.latency import phase_of
from secateur.spaces.measurement import MARGIN, TASK
from secateur.spaces.names import nearest


@dataclass(frozen=True)
class Objective:
    """Objective: one number of a measurement that a search can optimise.

    Args:
        label: for tables and axes.
        unit: of the value; empty where it has none.
        digits: significant digits in which two values must differ to count as different on a front; None: all.
            Candidates of one target differ by a few weights, which is no trade-off.
    """

    label: str
    unit: str
    direction: Literal["minimize", "maximize"] = "minimize"
    digits: int | None = None

    @property
    def sign(self) -> int:
        """Factor that turns the value into one to minimise."""
        return 1 if self.direction == "minimize" else -1

    def rounded(self, value: float) -> float:
        """Value rounded to the digits that count on a front."""
        return value if self.digits is None else float(f"{value:.{self.digits}g}")


# By the name of the value in a measurement.
OBJECTIVES: dict[str, Objective] = {
    "loss": Objective("loss", "nats/token"),
    "kl": Objective("KL to dense", "nats/token"),
    "ce": Objective("cross-entropy", "nats/token"),
    "weighted_kl": Objective("weighted KL to dense", "nats/token"),
    "acceptance": Objective("expected acceptance", "", "maximize"),
    "params": Objective("parameters", "parameters", digits=3),
    "sparsity": Objective("sparsity", "", "maximize", digits=2),
    "size_bytes": Objective("size", "bytes", digits=3),
    "macs": Objective("MACs", "MACs/token", digits=3),
    "nodes": Objective("formula size", "nodes"),
    "kv_bytes": Objective("KV cache", "bytes/token", digits=3),
    "latency_prefill": Objective("prefill latency", "ms", digits=3),
    "latency_decode": Objective("decode latency", "ms", digits=3),
}


@lru_cache(maxsize=64)  # asked for with each trial
def objective(name: str, loss: str = "kl") -> Objective:
    """Objective of this name.

    It is a row of `OBJECTIVES`, a latency at a batch size (``latency_decode@8``), or the accuracy or margin in a task
    (``task:<name>``).

    Args:
        name: of the objective.
        loss: name of the loss, whose unit ``loss`` has.

    Raises:
        ValueError: if there is none.
    """
    if name == "loss":
        return replace(OBJECTIVES[name], unit=loss_of(loss).unit)
    if name.startswith(MARGIN) and name != MARGIN:
        return Objective(f"margin in {name.removeprefix(MARGIN)}", "nats/sample", "maximize")
    if name.startswith(TASK) and name != TASK:
        return Objective(name.removeprefix(TASK), "", "maximize", digits=3)
    _, batch = phase_of(name) or (None, None)
    if batch is not None:
        first = OBJECTIVES[name.partition("@")[0]]
        return replace(first, label=f"{first.label} at batch {batch}")
    if name not in OBJECTIVES:
        known = [*OBJECTIVES, TASK + "<name>", MARGIN + "<name>"]
        raise ValueError(f"Expected known `objectives`, got {name!r}.{nearest(name, known)}")
    return OBJECTIVES[name]


def oriented(trial: Trial, objectives: Sequence[str], *, rounded: bool = False) -> tuple[float, ...]:
    """Values of the trial's objectives, with signs such that lower is better.

    Args:
        rounded: in the digits that count on a front.

    Raises:
        ValueError: if the trial lacks one of them.
    """
    values = trial.measurement.values
    missing = [name for name in objectives if name not in values]
    if missing:
        raise ValueError(
            f"Expected `values` of trial {trial.number} to hold {', '.join(missing)}, got {', '.join(values)}."
        )
    rows = [(objective(name), values[name]) for name in objectives]
    return tuple(row.sign * (row.rounded(value) if rounded else value) for row, value in rows)
