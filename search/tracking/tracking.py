"""Report of a search to an experiment tracker, by a thread of its own, so that no search waits for it."""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from secateur.search.budget import Spent
from secateur.search.controller import Trial
from secateur.search.loop.loop import Observer, Outcome
from secateur.search.mirror.address import masked
from secateur.search.settings.settings import Settings, resolved
from secateur.search.show.progress import Progress
from secateur.search.tracking.trackers import TrackerName, open_tracker

PATIENCE_S = 30.0  # to log what is left when the search has ended


class Tracking(Observer):
    """Observer of a search that logs its trials; a context manager, whose exit ends the thread.

    A step is a trial. A search that is continued logs all trials from the first on, into a new run of the tracker
    (TensorBoard: in place of the former ones), so that what a tracker missed is there after the next start. After an
    error the tracker gets nothing more; one message says so.

    Args:
        name: of the tracker.
        directory: of the run.
        settings: of the search.
        baselines: canonical texts by name.
        say: called with messages, in the driver's thread.
        patience: seconds for what is left at the end.
    """

    def __init__(
        self,
        name: TrackerName,
        directory: Path,
        settings: Settings,
        baselines: Mapping[str, str],
        say: Callable[[str], None],
        *,
        patience: float = PATIENCE_S,
    ) -> None:
        self._name = name
        self._directory = directory
        self._settings = settings
        self._progress = Progress(settings, baselines)  # used by the thread alone
        self._say = say
        self._patience = patience
        self._trials: SimpleQueue[Sequence[Trial] | None] = SimpleQueue()  # None: the end
        self._unsaid: deque[str] = deque()
        # A daemon: a server that hangs must not keep a process alive whose search has ended.
        self._thread = threading.Thread(target=self._follow, name=f"tracker {name}", daemon=True)

    def __enter__(self) -> Tracking:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._trials.put(None)
        self._thread.join(self._patience if kind is None else min(self._patience, 1.0))
        self._report()
        if self._thread.is_alive() and kind is None:
            self._say(
                f"the tracker {self._name} lacks the last trials, as it does not answer; they are safe in the run"
            )

    # --- as an observer of a search ---

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        self._report()
        self._trials.put(tuple(trials))

    def on_end(self, outcome: Outcome) -> None:
        self._report()

    def _report(self) -> None:
        while self._unsaid:
            self._say(self._unsaid.popleft())

    # --- the thread ---

    def _follow(self) -> None:
        try:
            with redirect_stdout(sys.stderr):  # some greet on stdout, which is for results
                tracker, step = open_tracker(self._name, self._directory), 0
            tracker.store_init_configuration(flat(resolved(self._settings)))
            while (trials := self._trials.get()) is not None:
                for trial in trials:
                    self._progress.add([trial])
                    tracker.log(values_of(trial, self._settings, self._progress.facts()), step=step)
                    step += 1
            with redirect_stdout(sys.stderr):
                tracker.finish()
        except Exception as error:  # noqa: BLE001  # trackers raise what they like; none ends a search
            words = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            reason = masked(words) or type(error).__name__
            self._unsaid.append(f"the tracker {self._name} failed: {reason}; the search goes on without it")


@contextmanager
def tracked(
    settings: Settings, directory: Path, baselines: Mapping[str, str], say: Callable[[str], None]
) -> Iterator[list[Tracking]]:
    """Observers for the trackers of the settings, whose threads end with the context."""
    with ExitStack() as last_first:
        last_first.callback(setattr, sys, "stdout", sys.stdout)  # of a thread that was left behind
        yield [
            last_first.enter_context(Tracking(name, directory, settings, baselines, say))
            for name in settings.trackers
        ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings with the paths of their keys, passwords masked; what is not set is left out."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float):
            found[f"{prefix}{key}"] = value
        elif value is not None:
            found[f"{prefix}{key}"] = masked(str(value))
    return found


def values_of(trial: Trial, settings: Settings, facts: Mapping[str, Any]) -> dict[str, float]:
    """Values of a trial for a tracker, and of the search up to it.

    Args:
        trial: of any fidelity.
        settings: of the search.
        facts: of `Progress`, this trial included.
    """
    m, spent = trial.measurement, facts["spent"]
    shown = [name for name in ("loss", *settings.optimised, "sparsity") if name in m.values]
    values = {f"{m.fidelity.text}/{name}": m.values[name] for name in shown if m.infeasible is None}
    values |= {
        "trial/number": trial.number,
        "trial/tokens": m.fidelity.n_tokens,
        "trial/infeasible": int(m.infeasible is not None),
    }
    best = {f"best/loss at {label}": found["loss"] for label, found in facts["best"].items()}
    search = {
        "spent/tokens": spent["tokens"],
        "spent/evaluations": spent["evaluations"],
        "front/trials": facts["front"],
    }
    if facts["hypervolume"] is not None:
        search["front/hypervolume"] = facts["hypervolume"]
    return {re.sub(r"[^\w./ -]+", "-", name): float(x) for name, x in (values | best | search).items()}
