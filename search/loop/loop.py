"""The loop of a search: ask, measure what is not known yet, remember, tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.executor import Executor, Job
from secateur.search.loop.ledger import Key, Ledger, Reason
from secateur.search.study.asks import Ask, AskLog
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement


@dataclass(frozen=True)
class Outcome:
    """How a search ended.

    Args:
        reason: ``budget`` is used up; the controller has ``finished``; it is ``exhausted`` and proposes only
            what is known; or somebody ``stopped`` the search.
        spent: work of the measurements that were told, those from memory included.
    """

    reason: Reason
    spent: Spent


class Observer(Protocol):
    """Looks on: a progress display, a mirror. Called in the driver, in order; must not change anything."""

    def on_start(self, n_known: int, budget: Budget) -> None:
        """A search begins, with `n_known` measurements in the study."""

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        """New in this run, whether measured now or known from before; `spent` includes them."""

    def on_end(self, outcome: Outcome) -> None:
        """The search has ended, by itself or by `stop`; not called after an exception."""


@dataclass
class _Round:
    """Proposals that are told together, once nothing of them is missing any more."""

    proposals: list[Proposal]
    missing: set[Key]


class Search:
    """Runs a controller until its budget is used up.

    **Deterministic**, without a log of asks: a round is the answer to one ``ask(batch)``. It begins when nothing is
    under way, and is told as a whole, in the order of its proposals. Measurements are kept in the order of the jobs;
    of several workers' one that is done before its turn waits for it in memory. Whether an answer comes from the
    study or from the executor makes no difference to what the controller sees, so a search that was killed ends
    with the trials of an unbroken one, whatever the number of workers.

    **Asynchronous**, with a log of asks: whenever the executor has free places, the controller is asked for as many
    proposals as fill them, and each result is told as it comes. Nobody waits for the slowest worker. A search that
    was killed is continued by making the same asks between the same trials once more; then what was under way is
    measured.

    The baselines are measured first: at the largest search fidelity, and whatever the budget.

    The budget counts distinct measurements told in this run, those from memory included. Evaluations and tokens
    are never exceeded (baselines excepted): the first proposal that would do so is dropped with the rest of its
    round, and the search ends. Time is known only afterwards: nothing is asked for once it is used up.

    Args:
        study: open for writing.
        baselines: candidates by name.
        controller: proposes.
        executor: measures.
        budget: when to end.
        fidelity: of the baselines: the largest one of the search.
        batch: proposals a round of a deterministic search.
        asks: log of an asynchronous search.
        locality_key: sort key of candidates; an asynchronous search puts neighbours, who share work, in one job.
        observers: look on.
    """

    def __init__(
        self,
        study: Study,
        baselines: Mapping[str, Any],
        controller: Controller,
        executor: Executor,
        budget: Budget,
        fidelity: Fidelity,
        *,
        batch: int = 16,
        asks: AskLog | None = None,
        locality_key: Callable[[Any], Any] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._study = study
        self.baselines = {name: str(candidate.text) for name, candidate in baselines.items()}
        self._baselines = [Proposal(candidate, fidelity) for candidate in baselines.values()]
        self._controller = controller
        self._executor = executor
        self._batch = batch
        self._log = asks
        self._locality_key = locality_key if asks is not None else None
        self._observers = observers
        self._ledger = Ledger(budget)
        self._waiting: dict[Key, list[_Round]] = {}  # what is under way, and who waits for it
        self._todo: dict[Key, Proposal] = {}  # of that what is not submitted yet
        self._early: dict[int, list[Measurement]] = {}  # of jobs that were done before their turn
        self._n_jobs = 0
        self._n_kept = 0  # jobs whose measurements are in the study
        self._horizon: int | None = (
            None  # while asks are repeated: trials from this number on are not known yet
        )

    def stop(self) -> None:
        """End after the jobs that are running, which are kept. May be called from a signal handler."""
        self._ledger.reason = "stopped"

    @property
    def notes(self) -> Mapping[str, float]:
        """The controller's, at this moment."""
        return self._controller.notes

    def run(self) -> Outcome:
        """Search until there is a reason to end. To be called once.

        Raises:
            StudyWriteError: if the disk is full. The study can be continued, as after any other exception,
                whether from the evaluator, the executor or the controller.
        """
        for observer in self._observers:
            observer.on_start(len(self._study.trials), self._ledger.budget)
        if self._log is None:
            self._begin(self._baselines)
            self._work(asking=False)
        else:
            self._repeat(self._log)
        self._work(asking=True)
        outcome = Outcome(self._ledger.reason or "finished", self._ledger.spent)
        for observer in self._observers:
            observer.on_end(outcome)
        return outcome

    def _work(self, *, asking: bool) -> None:
        """Keep the executor busy until nothing is under way."""
        while True:
            self._submit()
            if asking:
                self._ask()
            if not self._executor.n_pending:
                return
            self._receive()

    def _ask(self) -> None:
        """Begin rounds while there are free places and a budget left."""
        while self._ledger.reason is None and not self._todo and self._executor.n_free:
            if self._log is None and self._executor.n_pending:  # the round must end first
                return
            if self._ledger.used_up:
                self._ledger.reason = "budget"
                return
            n = self._batch if self._log is None else self._executor.n_free * self._executor.job_size
            proposals = self._controller.ask(n)
            if not proposals:  # it has finished, or waits for results
                return
            if self._log is not None:
                self._log.add(Ask(len(self._study.trials), n))
            self._begin(self._ledger.affordable(proposals))
            self._submit()

    def _repeat(self, log: AskLog) -> None:
        """Make the asks of a log once more, between the same trials."""
        self._horizon = log.first
        self._begin(self._baselines)
        for ask in log.asks:
            self._pass(ask.told)
            if self._ledger.reason is not None:
                break
            self._begin(self._ledger.affordable(self._controller.ask(ask.n)))
        self._pass(len(self._study.trials))
        self._horizon = None

    def _pass(self, number: int) -> None:
        """Deliver the trials before this number, as when they arrived."""
        arrived = self._study.trials[self._horizon : number]
        self._horizon = number
        self._deliver(arrived)

    def _lookup(self, key: Key) -> Trial | None:
        trial = self._study.lookup(key)
        hidden = trial is not None and self._horizon is not None and trial.number >= self._horizon
        return None if hidden else trial

    def _begin(self, proposals: list[Proposal]) -> None:
        """Note what is new to the study as to be measured, and tell what is not."""
        together = [proposals] if self._log is None else [[proposal] for proposal in proposals]
        rounds = [_Round(some, set()) for some in together]
        new: dict[Key, Proposal] = {}
        for each in rounds:
            for proposal in each.proposals:
                key = proposal.key
                if self._lookup(key) is None and key not in each.missing:
                    if key not in self._waiting:
                        new[key] = proposal
                    each.missing.add(key)
                    self._waiting.setdefault(key, []).append(each)
        self._ledger.add(proposals)
        self._queue(proposals, new)
        self._tell([each for each in rounds if not each.missing])

    def _queue(self, proposals: Sequence[Proposal], new: Mapping[Key, Proposal]) -> None:
        """Put what is new in the order in which it is to be measured: by fidelity, as all were proposed."""
        for fidelity in dict.fromkeys(proposal.fidelity for proposal in proposals):
            group = [proposal for proposal in new.values() if proposal.fidelity == fidelity]
            if self._locality_key is not None:
                locality_key = self._locality_key
                group.sort(key=lambda proposal: locality_key(proposal.candidate))
            self._todo |= {proposal.key: proposal for proposal in group}

    def _submit(self) -> None:
        while self._todo and self._executor.n_free and self._ledger.reason != "stopped":
            fidelity = next(iter(self._todo.values())).fidelity
            keys: list[Key] = []
            for key, proposal in self._todo.items():
                if proposal.fidelity != fidelity or len(keys) == self._executor.job_size:
                    break
                keys.append(key)
            texts = tuple(self._todo.pop(key).candidate.text for key in keys)
            self._executor.submit(Job(self._n_jobs, texts, fidelity))
            self._n_jobs += 1

    def _receive(self) -> None:
        """Wait for results, keep them, and tell the rounds that are complete by them."""
        for job, results in self._executor.wait():
            if [(m.candidate, m.fidelity) for m in results] != [(c, job.fidelity) for c in job.candidates]:
                raise RuntimeError(
                    f"Expected one measurement a candidate of job {job.number}, in order, got {len(results)} for "
                    f"{len(job.candidates)} candidates at {job.fidelity.text}, or others. Mend the evaluator."
                )
            self._early[job.number] = results
        measurements: list[Measurement] = []
        for number in sorted(self._early):
            if self._log is not None or number == self._n_kept:
                measurements += self._early.pop(number)
                self._n_kept += 1
        self._deliver(self._study.append(measurements))

    def _deliver(self, trials: Iterable[Trial]) -> None:
        """Tell the rounds that are complete by these; trials that nobody waits for are passed over."""
        complete: list[_Round] = []
        for trial in trials:
            key = trial.measurement.key
            self._todo.pop(key, None)
            for waiting in self._waiting.pop(key, ()):
                waiting.missing.discard(key)
                if not waiting.missing:
                    complete.append(waiting)
        self._tell(complete)

    def _tell(self, complete: Sequence[_Round]) -> None:
        told: list[Trial] = []
        for each in complete:
            found = [self._study.lookup(proposal.key) for proposal in each.proposals]
            trials = [trial for trial in found if trial is not None]  # all of them
            if trials:
                self._controller.tell(trials)
                told += trials
        new = self._ledger.tell(told)
        if new:
            for observer in self._observers:
                observer.on_trials(new, self._ledger.spent)
