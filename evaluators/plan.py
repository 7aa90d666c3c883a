"""What a worker needs to know to set itself up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from secateur.evaluators.latency.store import TableSource
from secateur.evaluators.tasks.plan import TaskPlan
from secateur.evaluators.training.recipe import Recipe
from secateur.pruners.pruner import RIGS, Rig
from secateur.spaces.measurement import Fidelity


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know to set itself up; plain values only.

    Args:
        model, dtype, device, trust_remote_code: see `load_model`.
        space: settings of the space.
        loss: which loss is minimised.
        calibration, search, test: sources of text.
        window: tokens a window.
        calibration_tokens: size of the calibration set.
        fidelities: all that may be asked for: the search's, ascending, then the test's.
        seed: which windows are drawn, the noise of the random metric, and the order of light training.
        training: how candidates are trained lightly, as long as a fidelity says; None: not at all.
        latency: where the latency table is; None: no latencies are predicted.
        tasks: in which tasks candidates are measured at the largest fidelity of the search; None: in none.
    """

    model: str
    dtype: str
    device: str
    trust_remote_code: bool
    space: Any
    loss: Literal["kl", "ce"]
    calibration: str
    search: str
    test: str
    window: int
    calibration_tokens: int
    fidelities: tuple[Fidelity, ...]
    seed: int
    training: Recipe | None = None
    latency: TableSource | None = None
    tasks: TaskPlan | None = None

    @property
    def rig(self) -> Rig:
        """How candidates of the space turn into weights."""
        return RIGS[self.space.kind]

    @property
    def sources(self) -> Mapping[str, str]:
        """Further sources of text that candidates of the space calibrate on, by name; "": that of `calibration`."""
        return getattr(self.space, "texts", {})

    @property
    def proxy(self) -> Fidelity | None:
        """What foretells losses without a forward pass, where the space has it."""
        has_one = getattr(self.space, "proxy", None) is not None
        return Fidelity("proxy", self.calibration_tokens) if has_one else None

    @property
    def final_fidelities(self) -> tuple[Fidelity, Fidelity]:
        """What finished models are measured at: the largest one of the search and the test's, as they are."""
        search, test = (replace(fidelity, n_trained=0) for fidelity in self.fidelities[-2:])
        return search, test
