"""Adapter of controllers to Ray Tune: a `Searcher` that asks a controller and tells it the results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.errors import UsageError
from secateur.search.loop.ledger import MAX_KNOWN_IN_A_ROW
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.space import Space
from secateur.spaces.whole_file import whole_file

try:
    Searcher: Any = import_module("ray.tune.search").Searcher
except ModuleNotFoundError:  # an extra; the constructor raises
    Searcher = None


class ControllerSearcher(Searcher or object):  # type: ignore[misc]
    """Search algorithm for ``tune.TuneConfig(search_alg=ControllerSearcher(make, space, fidelity))``.

    A trial receives ``config = {"candidate": text, "fidelity": text}``, to be read by ``space.parse`` and
    `Fidelity.parse`, and reports its measurements by name, at least ``loss``. The baselines are proposed first.
    Repeated proposals are answered from memory, without a trial. A trial that fails, or reports a value that is not
    finite, counts as infeasible. Tune waits while the controller needs results, and ends when it has finished. The
    controller ignores early stopping by a Tune scheduler: the last report counts as the result.

    Its state is the sequence of asks and results; restored and unpickled searchers replay it with a new controller.

    Args:
        make: makes a controller in its initial state; picklable, as Tune pickles searchers.
        space: of the candidates; gives the baselines, and the exact costs told with the results.
        fidelity: of the baselines: the largest one of the controller.
        values: names of the reported numbers to tell, ``loss`` among them.

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
        """Reset to the initial state."""
        self._controller = self._make()
        baselines = self._space.baselines().values()
        self._baselines = [Proposal(candidate, self._fidelity) for candidate in baselines]
        self._events: list[list[Any]] = []  # ["ask", trial] or ["tell", trial, values or reason], in order
        self._under_way: dict[str, Proposal] = {}  # by Tune's trial id
        self._waiting: dict[tuple[str, str], int] = {}  # repeated proposals of pending candidates
        self._known: dict[tuple[str, str], Trial] = {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accept Tune's own metric and mode if they agree with ours."""
        return not config and metric in (None, self._names[0]) and mode in (None, "min")

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        """Configuration of a new trial; None while the controller needs results; ``FINISHED`` at the end."""
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
        """Tell the controller the result of a trial."""
        if trial_id not in self._under_way:  # Tune may report a trial twice
            return
        self._tell(trial_id, self._outcome(result, error))

    def _outcome(self, result: Mapping[str, Any] | None, error: bool) -> dict[str, float] | str:
        """Values of a trial, or the reason why it has none."""
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
        """Write the asks and results."""
        with whole_file(Path(checkpoint_path)) as new:
            new.write_text(json.dumps(self._events) + "\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Replay the asks and results of a file."""
        self.__setstate__(json.loads(Path(checkpoint_path).read_text(encoding="utf-8")))

    def __setstate__(self, events: Sequence[Sequence[Any]]) -> None:
        """Replay asks and results."""
        self._begin()
        for what, trial_id, *outcome in events:
            if what == "ask":
                self.suggest(trial_id)
            else:
                self._tell(trial_id, outcome[0])

    def __reduce__(self) -> Any:
        make = partial(ControllerSearcher, values=self._names)
        return make, (self._make, self._space, self._fidelity), self._events
