"""Loop of a search: ask the controller, measure new proposals, store the results, tell the controller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.executor import Executor, Job
from secateur.search.loop.ledger import ENDINGS, Key, Ledger, Reason
from secateur.search.loop.resume import Resume
from secateur.search.study.asks import Ask, AskLog
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement


@dataclass(frozen=True)
class Outcome:
    """End of a search.

    Args:
        reason: the ``budget`` is used up; the controller has ``finished``, or is ``exhausted`` and repeats known
            proposals; or the search was ``stopped``.
        spent: work of the measurements told to the controller, stored ones included.
        ending: why the controller has finished, if it has.
    """

    reason: Reason
    spent: Spent
    ending: str = ""

    @property
    def why(self) -> str:
        """The reason for people, with the controller's own where it has finished."""
        return f"{ENDINGS[self.reason]}: {self.ending}" if self.ending else ENDINGS[self.reason]


class Observer:
    """Read-only observer of a search, such as a progress display. Called in the driver, in order.

    A subclass defines the methods that it needs.
    """

    def on_start(self, n_known: int, budget: Budget) -> None:
        """Start of a search, with `n_known` measurements in the study."""

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        """Trials new to this run, whether measured now or stored before; `spent` includes them."""

    def on_end(self, outcome: Outcome) -> None:
        """End of the search, by itself or by `stop`; not called after an exception."""


@dataclass
class _Round:
    """Proposals told together, as soon as all of them are measured."""

    proposals: list[Proposal]
    missing: set[Key]


class Search:
    """Run of a controller until the budget is used up.

    **Deterministic**, without a log of asks: a round is the answer to one ``ask(batch)``. It begins when no
    measurement is pending, and is told as a whole, in the order of its proposals. Measurements are stored in the order
    of the jobs; a job that a worker finishes early waits in memory. Results from the study and from the executor look
    the same to the controller, so a search that was killed and continued has the trials of an uninterrupted one,
    whatever the number of workers.

    **Asynchronous**, with a log of asks: the controller is asked for as many proposals as the executor has free
    places, and each result is told as it arrives, so that no worker waits for the slowest. A killed search is
    continued by replay, see `Resume`; then its pending proposals are measured.

    The baselines are measured first, at the largest search fidelity, whatever the budget.

    The budget counts distinct measurements told in this run, stored ones included. Evaluations and tokens are never
    exceeded (baselines excepted): the first proposal that would do so is dropped with the rest of its round, and the
    search ends. Time is only known afterwards: the controller is not asked again once it is used up.

    Args:
        study: open for writing.
        baselines: candidates by name.
        controller: proposes candidates.
        executor: measures them.
        budget: limits of the search.
        fidelity: of the baselines: the largest one of the search.
        batch: proposals a round of a deterministic search.
        asks: log of an asynchronous search.
        locality_key: sort key of candidates; an asynchronous search puts neighbours, which share computation, into
            one job.
        observers: called as the search proceeds.
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
        self._resume = Resume(study, controller, self._ledger)
        self._waiting: dict[Key, list[_Round]] = {}  # rounds that wait for each pending measurement
        self._todo: dict[Key, Proposal] = {}  # pending ones that are not submitted yet
        self._early: dict[int, list[Measurement]] = {}  # of jobs finished before their turn
        self._n_jobs = 0
        self._n_kept = 0  # jobs whose measurements are in the study

    def stop(self) -> None:
        """End after the running jobs, whose results are kept. May be called from a signal handler."""
        self._ledger.reason = "stopped"

    @property
    def notes(self) -> Mapping[str, float]:
        """The controller's present notes."""
        return self._controller.notes

    def run(self) -> Outcome:
        """Search until the budget is used up or the controller has finished. To be called once.

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
            self._resume.run(self._log, self._baselines, self._begin, self._deliver)
        self._work(asking=True)
        reason = self._ledger.reason or "finished"
        outcome = Outcome(reason, self._ledger.spent, self._controller.ending if reason == "finished" else "")
        for observer in self._observers:
            observer.on_end(outcome)
        return outcome

    def _work(self, *, asking: bool) -> None:
        """Keep the executor busy until no job is pending."""
        while True:
            self._submit()
            if asking:
                self._ask()
            if not self._executor.n_pending:
                return
            if self._ledger.reason == "stopped" and not self._executor.worker_status.workers:
                return  # none has begun: the next run measures what is pending
            self._receive()

    def _ask(self) -> None:
        """Begin rounds while the executor has free places and the budget lasts."""
        while self._ledger.reason is None and not self._todo and self._executor.n_free:
            if self._log is None and self._executor.n_pending:  # the round must end first
                return
            if self._ledger.used_up:
                self._ledger.reason = "budget"
                return
            n = self._batch if self._log is None else self._executor.n_free * self._executor.job_size
            proposals = self._controller.ask(n)
            if not proposals:  # finished, or waiting for results
                return
            if self._log is not None:
                self._log.add(Ask(len(self._study.trials), n))
            self._begin(self._ledger.affordable(proposals, self._controller.refuse))
            self._submit()

    def _begin(self, proposals: list[Proposal]) -> None:
        """Queue proposals that are new to the study, and tell the results of the others."""
        together = [proposals] if self._log is None else [[proposal] for proposal in proposals]
        rounds = [_Round(some, set()) for some in together]
        new: dict[Key, Proposal] = {}
        for each in rounds:
            for proposal in each.proposals:
                key = proposal.key
                if self._resume.lookup(key) is None and key not in each.missing:
                    if key not in self._waiting:
                        new[key] = proposal
                    each.missing.add(key)
                    self._waiting.setdefault(key, []).append(each)
        self._ledger.add(proposals)
        self._queue(proposals, new)
        self._tell([each for each in rounds if not each.missing])

    def _queue(self, proposals: Sequence[Proposal], new: Mapping[Key, Proposal]) -> None:
        """Queue new proposals, grouped by fidelity in the order of their first proposal."""
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
        """Wait for results, store them, and tell the rounds they complete."""
        for job, results in self._executor.wait():
            if [(m.candidate, m.fidelity) for m in results] != [(c, job.fidelity) for c in job.candidates]:
                raise RuntimeError(
                    f"Expected one measurement a candidate of job {job.number}, in order, got {len(results)} for "
                    f"{len(job.candidates)} candidates at {job.fidelity.text}, or others. Correct the evaluator."
                )
            self._early[job.number] = results
        measurements: list[Measurement] = []
        for number in sorted(self._early):
            if self._log is not None or number == self._n_kept:
                measurements += self._early.pop(number)
                self._n_kept += 1
        self._deliver(self._study.append(measurements))

    def _deliver(self, trials: Iterable[Trial]) -> None:
        """Tell the rounds completed by these trials; others are skipped."""
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
