"""Training runs on Ray Tune: checkpoints, retries, early stopping, resume after a kill."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur.search.errors import UsageError
from secateur.search.executors.cluster.connection import connect, disconnect
from secateur.search.executors.cluster.lazy_ray import kept_to_this_machine, prepare_ray
from secateur.search.executors.cluster.settings import RaySettings

MAX_FAILURES = 2
"""Retries of a run after its worker died, each from the last checkpoint."""

Say = Callable[[str], None]


Make = Callable[[], Any]
"""Makes a training run in a worker, see `evaluators.recovery.Recovery`.

Its `step` trains a part and gives ``loss``, ``trained_tokens``, ``tokens``, ``done``, ``failure`` and ``course``;
`save` and `load` write and read its state in a directory.
"""


@dataclass(frozen=True)
class Trained:
    """Result of a training run.

    Args:
        state: directory of the last checkpoint; None if there is none.
        trained_tokens: tokens trained on.
        course: reports of the training, in order.
        seconds: of training, over all attempts.
        reason: for an incomplete training; None if it is complete.
    """

    state: Path | None
    trained_tokens: int
    course: Sequence[Mapping[str, Any]]
    seconds: float
    reason: str | None


@contextmanager
def ray_started(address: str | None) -> Iterator[None]:
    """Connection to Ray: the one of this process, the cluster at the address, or one started here.

    Raises:
        UsageError: if Ray Tune is not installed, or the cluster can't be joined.
    """
    try:
        with kept_to_this_machine() if address is None else nullcontext():  # at Ray's first import
            _tune()  # an extra of Ray's own
    except ModuleNotFoundError as error:
        raise UsageError(
            f'Expected Ray with Tune, got no module {error.name}. Install it with: pip install "secateur[recover]".'
        ) from None
    try:
        settings = RaySettings(address=address)
    except ValidationError:
        raise UsageError(f"Expected `--address` auto or host:port, got {address!r}. Correct it.") from None
    connection = connect(settings)
    try:
        yield
    finally:
        disconnect(connection)


def train_all(
    sessions: Mapping[int, Make],
    directory: Path,
    *,
    competing: bool,
    use_gpu: bool,
    say: Say,
) -> dict[int, Trained]:
    """Run each session to its end, as many at a time as the resources allow; within `ray_started`.

    The same call with the same directory resumes a killed one.

    Args:
        sessions: factories, called in a worker, by number of the trial.
        directory: of the Tune experiment; shared by all nodes.
        competing: end the worse ones early, by ASHA (https://arxiv.org/abs/1810.05934) on ``loss``.
        use_gpu: give each one a GPU, if the cluster has any.
        say: called with one line a report.
    """
    tune = _tune()
    token = _SAY.set(say)
    try:
        with _settled_tune():
            trainable = tune.with_resources(_trainable(sessions), _resources(len(sessions), use_gpu))
            if tune.Tuner.can_restore(str(directory)):
                # Killed before its first trial, Tune forgets the space of a Tuner that is not given it again.
                tuner = tune.Tuner.restore(
                    str(directory), trainable, resume_errored=True, param_space=_space(sorted(sessions))
                )
            else:
                tuner = _new_tuner(trainable, sorted(sessions), directory, competing=competing)
            results = list(tuner.fit())
    finally:
        _SAY.reset(token)
    return {result.config["trial"]: _trained(result) for result in results}


def _new_tuner(trainable: Any, numbers: Sequence[int], directory: Path, *, competing: bool) -> Any:
    tune = _tune()
    # No run is stopped before a third of its slices; max_t only spaces the rungs: a run ends by itself.
    asha = tune.schedulers.ASHAScheduler(
        time_attr="training_iteration", max_t=100, grace_period=3, reduction_factor=3, stop_last_trials=False
    )
    return tune.Tuner(
        trainable,
        param_space=_space(numbers),
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", reuse_actors=True, scheduler=asha if competing else None
        ),
        run_config=tune.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent.absolute()),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=2, checkpoint_frequency=1, checkpoint_at_end=True
            ),
            callbacks=[_lines()],
            verbose=0,
        ),
    )


def _space(numbers: Sequence[int]) -> dict[str, Any]:
    """Space of Tune's: a run for each trial."""
    return {"trial": _tune().grid_search(list(numbers))}


def _trainable(sessions: Mapping[int, Make]) -> Any:
    """Trainable class for Tune's workers, which is pickled with the sessions."""
    base: Any = _tune().Trainable

    class Recover(base):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            self._session = sessions[config["trial"]]()

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            report: dict[str, Any] = self._session.step()
            return report

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            self._session.save(Path(checkpoint_dir))

        def load_checkpoint(self, checkpoint: str) -> None:
            self._session.load(Path(checkpoint))

    return Recover


def _resources(n_trials: int, use_gpu: bool) -> dict[str, float]:
    """Resources of a run: one GPU if the cluster has any, else an equal share of the CPUs."""
    ray: Any = importlib.import_module("ray")
    cluster = ray.cluster_resources()
    if use_gpu and cluster.get("GPU", 0) >= 1:
        return {"cpu": 1, "gpu": 1}
    largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    return {"cpu": max(1, min(largest, cluster.get("CPU", 1) // n_trials))}


def _trained(result: Any) -> Trained:
    metrics = result.metrics or {}
    tokens, reason = int(metrics.get("trained_tokens", 0)), metrics.get("failure")
    if result.error is not None:
        last = str(result.error).strip().splitlines()[-1]
        reason = f"failed {MAX_FAILURES + 1} times: {last}"
    elif reason is None and not (metrics and tokens == metrics["tokens"]):
        reason = f"stopped early, at {tokens:,} tokens: others did better"
    state = None if result.checkpoint is None else Path(result.checkpoint.path)
    return Trained(state, tokens, metrics.get("course", ()), float(metrics.get("time_total_s", 0.0)), reason)


# --- Tune's settings ---


def _tune() -> Any:
    """Module of Ray Tune, untyped as it may not be installed."""
    prepare_ray()
    return importlib.import_module("ray.tune")


_SAY: ContextVar[Say] = ContextVar("_SAY")


def _lines() -> Any:
    """Callback of Tune's that prints one line a report."""
    base: Any = _tune().Callback

    class Lines(base):  # type: ignore[misc]
        def __reduce__(self) -> Any:  # Tune pickles it; the restored one is to speak to the driver of then
            return _lines, ()

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            done, tokens = result["trained_tokens"], result["tokens"]
            _SAY.get()(
                f"trial {trial.config['trial']}: {done:,}/{tokens:,} tokens, validation loss {result['loss']:.4f}"
            )

    return Lines()


@contextmanager
def _settled_tune() -> Iterator[None]:
    """Tune within a command: no logs of its own, and frequent snapshots, so that a kill loses nothing."""
    wanted = {
        "TUNE_GLOBAL_CHECKPOINT_S": "1",  # else the last 10 s of finished results are lost on a kill
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints whatever `verbose` says
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # models and texts may be given by relative paths
    }
    before = {name: os.environ.get(name) for name in wanted}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train")]
    levels = [logger.level for logger in loggers]
    os.environ.update(wanted)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
