"""What a search can optimise: names, units, directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.search.controller import Trial


@dataclass(frozen=True)
class Objective:
    """One number of a measurement that a search can optimise.

    Args:
        label: for tables and axes.
        unit: of the value; empty where it has none.
        direction: what is better.
    """

    label: str
    unit: str
    direction: Literal["minimize", "maximize"] = "minimize"

    @property
    def sign(self) -> int:
        """Factor that turns the value into one to minimise."""
        return 1 if self.direction == "minimize" else -1


# By the name of the value in a measurement.
OBJECTIVES: dict[str, Objective] = {
    "loss": Objective("loss", "nats/token"),
    "kl": Objective("KL to dense", "nats/token"),
    "ce": Objective("cross-entropy", "nats/token"),
    "params": Objective("parameters", "parameters"),
    "sparsity": Objective("sparsity", "", "maximize"),
    "size_bytes": Objective("size", "bytes"),
    "macs": Objective("MACs", "MACs/token"),
    "kv_bytes": Objective("KV cache", "bytes/token"),
}


def oriented(trial: Trial, objectives: Sequence[str]) -> tuple[float, ...]:
    """The trial's values of the objectives, each turned so that less is better.

    Raises:
        ValueError: if the trial lacks one of them.
    """
    values = trial.measurement.values
    missing = [name for name in objectives if name not in values]
    if missing:
        raise ValueError(
            f"Expected `values` of trial {trial.number} to hold {', '.join(missing)}, got {', '.join(values)}."
        )
    return tuple(OBJECTIVES[name].sign * values[name] for name in objectives)
