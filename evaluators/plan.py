"""SessionPlan of an evaluator: plain values that a worker sets itself up by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from secateur.evaluators.latency.store import TableSource
from secateur.evaluators.tasks.plan import TaskPlan
from secateur.evaluators.training.settings import Training
from secateur.spaces.measurement import Fidelity


@dataclass(frozen=True)
class SessionPlan:
    """Plain values that a worker sets itself up by.

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
    training: Training | None = None
    latency: TableSource | None = None
    tasks: TaskPlan | None = None

    @property
    def proxy(self) -> Fidelity | None:
        """The fidelity of losses foretold without a forward pass, where the space has them."""
        return Fidelity("proxy", self.calibration_tokens) if self.space.has_proxy else None

    @property
    def final_fidelities(self) -> tuple[Fidelity, Fidelity]:
        """Fidelities of finished models: the largest one of the search and the test's, without training."""
        search, test = (replace(fidelity, n_trained=0) for fidelity in self.fidelities[-2:])
        return search, test
