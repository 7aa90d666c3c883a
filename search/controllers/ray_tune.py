"""Our controllers for anyone's Ray Tune: a `Searcher` that asks a controller and tells it the results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.errors import UsageError
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.space import Space
from secateur.spaces.whole_file import whole_file

try:
    Searcher: Any = import_module("ray.tune.search").Searcher
except ModuleNotFoundError:  # an extra; the constructor says so
    Searcher = None

MAX_KNOWN_IN_A_ROW = 1000
"""So many proposals in a row that were all answered before mean that a controller goes round in circles."""


class ControllerSearcher(Searcher or object):  # type: ignore[misc]
    """Use as ``tune.TuneConfig(search_alg=ControllerSearcher(make, space, fidelity))``.

    A trial gets ``config = {"candidate": text, "fidelity": text}`` and reports what it measured by name, ``loss`` at
    least; ``space.parse`` and `Fidelity.parse` read the texts. The baselines come first. What the controller proposes
    again is answered from memory, without a trial. A trial that fails, or reports a value that is not finite, is told
    as infeasible. Tune waits while results must come first, and ends when the controller has finished.
    Of early stopping by a Tune scheduler the controller knows nothing: it takes the last report for the result.

    Its state is what was asked and told; restored and unpickled searchers repeat that with a new controller.

    Args:
        make: gives a fresh controller, always the same; to be picklable, as Tune pickles searchers.
        space: of its candidates; gives the baselines, and the exact costs that are told with the results.
        fidelity: of the baselines: the largest one of the controller.
        values: names of reported numbers that are told; ``loss`` among them.

    Raises:
        UsageError: if Ray Tune is not installed.
    """

    def __init__(
        self,
        make: Callable[[], Controller],
        space: Space[Any],
        fidelity: Fidelity,
        *,
        values: Sequence[str] = ("loss",),
    ) -> None:
        if Searcher is None:
            raise UsageError(
                'Expected Ray with Tune, got none. Install it with: pip install "secateur[ray]".'
            )
        super().__init__(metric=values[0], mode="min")
        self._make = make
        self._space = space
        self._fidelity = fidelity
        self._names = tuple(values)
        self._begin()

    def _begin(self) -> None:
        """As if nothing had been asked."""
        self._controller = self._make()
        baselines = self._space.baselines().values()
        self._baselines = [Proposal(candidate, self._fidelity) for candidate in baselines]
        self._events: list[list[Any]] = []  # ["ask", trial] or ["tell", trial, values or reason], in order
        self._under_way: dict[str, Proposal] = {}  # by Tune's name of the trial
        self._waiting: dict[tuple[str, str], int] = {}  # further proposals of what is under way
        self._known: dict[tuple[str, str], Trial] = {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Metric and direction may be given to Tune, too, as long as they are the same."""
        return not config and metric in (None, self._names[0]) and mode in (None, "min")

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        """The configuration of a new trial; None while results must come first; ``FINISHED``."""
        self._events.append(["ask", trial_id])
        for _ in range(MAX_KNOWN_IN_A_ROW):
            proposals = [self._baselines.pop(0)] if self._baselines else self._controller.ask(1)
            if not proposals:
                return None if self._under_way else str(Searcher.FINISHED)
            (proposal,) = proposals
            key = proposal.key
            if key in self._known:
                self._controller.tell([self._known[key]])
            elif any(other.key == key for other in self._under_way.values()):
                self._waiting[key] = self._waiting.get(key, 0) + 1
            else:
                self._under_way[trial_id] = proposal
                return {"candidate": proposal.candidate.text, "fidelity": proposal.fidelity.text}
        return None if self._under_way else str(Searcher.FINISHED)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the controller."""
        if trial_id not in self._under_way:  # Tune may report a trial twice
            return
        self._tell(trial_id, self._outcome(result, error))

    def _outcome(self, result: Mapping[str, Any] | None, error: bool) -> dict[str, float] | str:
        """The values of a trial, or the reason why there are none."""
        if error or result is None:
            return "its trial failed"
        missing = [name for name in self._names if name not in result]
        if missing:
            return f"its trial reported no {missing[0]}"
        values = {name: float(result[name]) for name in self._names}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        return f"its {bad[0]} is not finite" if bad else values

    def _tell(self, trial_id: str, outcome: dict[str, float] | str) -> None:
        self._events.append(["tell", trial_id, outcome])
        proposal = self._under_way.pop(trial_id)
        text, fidelity = proposal.candidate.text, proposal.fidelity
        if isinstance(outcome, str):
            measurement = Measurement(text, fidelity, infeasible=outcome, n_tokens=fidelity.n_tokens)
        else:
            values = {**self._space.cost(proposal.candidate), **outcome}
            measurement = Measurement(text, fidelity, values, n_tokens=fidelity.n_tokens)
        trial = self._known[measurement.key] = Trial(len(self._known), measurement)
        for _ in range(1 + self._waiting.pop(measurement.key, 0)):
            self._controller.tell([trial])

    # --- state, as Tune saves and restores it ---

    def save(self, checkpoint_path: str) -> None:
        """Keep what was asked and told."""
        with whole_file(Path(checkpoint_path)) as new:
            new.write_text(json.dumps(self._events) + "\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Go back to what was kept."""
        self._repeat(json.loads(Path(checkpoint_path).read_text(encoding="utf-8")))

    def _repeat(self, events: Sequence[Sequence[Any]]) -> None:
        self._begin()
        for what, trial_id, *outcome in events:
            if what == "ask":
                self.suggest(trial_id)
            else:
                self._tell(trial_id, outcome[0])

    def __reduce__(self) -> Any:
        return _again, (self._make, self._space, self._fidelity, self._names, self._events)


def _again(
    make: Callable[[], Controller],
    space: Space[Any],
    fidelity: Fidelity,
    values: Sequence[str],
    events: Sequence[Sequence[Any]],
) -> ControllerSearcher:
    """An unpickled searcher."""
    searcher = ControllerSearcher(make, space, fidelity, values=values)
    searcher._repeat(events)
    return searcher
