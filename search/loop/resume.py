"""Resume of an asynchronous search: its logged asks, repeated between the same trials.

A deterministic search needs none of this: it is run again, and the study answers what it has measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.loop.ledger import Key, Ledger
from secateur.search.study.asks import AskLog
from secateur.search.study.study import Study


class Resume:
    """Replay of a log of asks, which gives the controller the state that it had when the search ended.

    During the replay trials later than the current ask are hidden, as they were when it was made. The controller is in
    its initial state.
    """

    def __init__(self, study: Study, controller: Controller, ledger: Ledger) -> None:
        self._study = study
        self._controller = controller
        self._ledger = ledger
        self._n_visible: int | None = None  # None: all

    def run(
        self,
        log: AskLog,
        baselines: list[Proposal],
        begin: Callable[[list[Proposal]], None],
        deliver: Callable[[Sequence[Trial]], None],
    ) -> None:
        """Repeat the asks of a log; `begin` starts measurements, `deliver` tells the controller about trials."""
        self._n_visible = log.first
        begin(baselines)
        for ask in log.asks:
            deliver(self._advance(ask.told))
            if self._ledger.reason is not None:
                break
            begin(self._ledger.affordable(self._controller.ask(ask.n), self._controller.refuse))
        deliver(self._advance(len(self._study.trials)))
        self._n_visible = None

    def lookup(self, key: Key) -> Trial | None:
        """The study's trial of this key, unless it is hidden."""
        trial = self._study.lookup(key)
        hidden = trial is not None and self._n_visible is not None and trial.number >= self._n_visible
        return None if hidden else trial

    def _advance(self, number: int) -> Sequence[Trial]:
        """The hidden trials before this number, visible from now on."""
        trials = self._study.trials[self._n_visible : number]
        self._n_visible = number
        return trials
