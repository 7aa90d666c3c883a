"""Plan of a session: plain values that determine model, space, data and evaluator, in the driver and in workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from secateur.evaluators.latency.store import TableSource
from secateur.evaluators.tasks.task_set import TaskPlan
from secateur.evaluators.training.settings import Training
from secateur.spaces.measurement import MARGIN, Fidelity
from secateur.spaces.streaming import Stream


@dataclass(frozen=True)
class SessionPlan:
    """Plain values that determine a session.

    Args:
        model, dtype, device, trust_remote_code: see `load_model`.
        space: settings of the space.
        loss: the one that is minimised: a mean of `LossSums`, or ``margin:<task>``.
        measures: means of `LossSums` besides ``kl`` and ``ce``: ``weighted_kl``, ``acceptance``.
        calibration, search, test: sources of text.
        contrast: source of a second calibration text; None: there is none.
        window: tokens a window.
        calibration_tokens: size of the calibration set.
        fidelities: the search's, ascending, then the test's.
        seed: of the windows, the noise of the random metric, and the order of light training.
        training: light training of candidates, for as many tokens as a fidelity has; None: no training.
        latency: source of the latency table; None: no latencies.
        tasks: to measure candidates in, at the largest fidelity of the search; None: no tasks.
        bos: see `bos_token`.
        moe_all_experts: see `Anatomy.all_experts`.
        allow_long_windows: see `check_windows`.
        curvature: fidelity of the curvature of the dense model, on calibration windows; None: no effects are asked for.
        stream: a word of `STREAM`, see `open_model`.
        compiled: candidates and the dense side of the loss run by `torch.compile`, see `BlockRunner`.
        folders: that a relative path of the model is looked for in, see `located`.
    """

    model: str
    dtype: str
    device: str
    trust_remote_code: bool
    space: Any
    loss: str
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
    bos: bool | Literal["auto"] = "auto"
    moe_all_experts: bool = False
    allow_long_windows: bool = False
    measures: tuple[str, ...] = ()
    curvature: Fidelity | None = None
    folders: tuple[Path, ...] = ()
    stream: Stream = "never"
    contrast: str | None = None
    compiled: bool = False

    @property
    def proxy(self) -> Fidelity | None:
        """Fidelity of losses without a forward pass, if the space has a proxy."""
        return Fidelity("proxy", self.calibration_tokens) if self.space.has_proxy else None

    @property
    def margin(self) -> str | None:
        """Name of the task whose margin is the loss; None: no task's."""
        return self.loss.removeprefix(MARGIN) if self.loss.startswith(MARGIN) else None

    @property
    def streamed_loss(self) -> str:
        """The loss if it is a mean over tokens, else ``kl``."""
        return "kl" if self.margin is not None else self.loss

    @property
    def final_fidelities(self) -> tuple[Fidelity, Fidelity]:
        """Fidelities of finished models: the largest one of the search and the test's, without training."""
        search, test = (replace(fidelity, n_trained=0) for fidelity in self.fidelities[-2:])
        return search, test
