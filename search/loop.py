"""The loop of a search: ask, measure what is not known yet, remember, tell."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.executor import Executor, Job
from secateur.search.settings import Budget
from secateur.search.study import Spent, Study
from secateur.spaces.measurement import Fidelity, Measurement

Key = tuple[str, str]
Reason = Literal["budget", "finished", "exhausted", "stopped"]

# So many proposals in a row that were all answered before mean that a controller goes round in circles.
MAX_KNOWN_IN_A_ROW = 1000


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
    """The answer to one ``ask``, told as a whole when nothing of it is missing any more."""

    proposals: list[Proposal]
    missing: set[Key]


class Search:
    """Runs a controller until its budget is used up.

    A round is the answer to one ``ask(batch)``. Its proposals are measured in one job a fidelity, and are told
    together, in the order of the proposals, once all of them are known. Whether an answer comes from the study or
    from the executor makes no difference to what the controller sees, so a study is continued by the same calls
    once more: with one job at a time, a search that was killed ends with the trials of an unbroken one.

    The baselines are the first round: at the largest search fidelity, and whatever the budget.

    The budget counts distinct measurements told in this run, those from memory included. Evaluations and tokens
    are never exceeded (baselines excepted): the first proposal that would do so is dropped with the rest of its
    round, and the search ends. Time is known only afterwards: no round begins once it is used up.

    Args:
        study: open for writing.
        baselines: candidates by name.
        controller: proposes.
        executor: measures.
        budget: when to end.
        fidelity: of the baselines: the largest one of the search.
        batch: proposals a round, and most candidates a job.
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
        observers: Sequence[Observer] = (),
    ) -> None:
        self._study = study
        self._baselines = [Proposal(candidate, fidelity) for candidate in baselines.values()]
        self._controller = controller
        self._executor = executor
        self._budget = budget
        self._batch = batch
        self._observers = observers
        self._queue: deque[Job] = deque()  # not yet submitted
        self._waiting: dict[Key, list[_Round]] = {}  # what is under way, and who waits for it
        self._asked: set[Key] = set()  # in the rounds so far: told or under way
        self._told: set[Key] = set()
        self._n_tokens = 0  # spent on what was told, and expected for what is under way
        self._spent = Spent()
        self._n_jobs = 0
        self._n_known_in_a_row = 0
        self._reason: Reason | None = None  # why nothing more is asked

    def stop(self) -> None:
        """End after the jobs that are running, which are kept. May be called from a signal handler."""
        self._reason = "stopped"

    def run(self) -> Outcome:
        """Search until there is a reason to end. To be called once.

        Raises:
            StudyWriteError: if the disk is full. The study can be continued, as after any other exception,
                whether from the evaluator, the executor or the controller.
        """
        for observer in self._observers:
            observer.on_start(len(self._study.trials), self._budget)
        self._begin(self._baselines)
        self._work(asking=False)
        self._work(asking=True)
        outcome = Outcome(self._reason or "finished", self._spent)
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
        """Begin rounds while there is a free place and a budget left."""
        while self._reason is None and not self._queue and self._executor.n_free:
            if self._used_up():
                self._reason = "budget"
                return
            proposals = self._controller.ask(self._batch)
            if not proposals:  # it has finished, or waits for results
                return
            self._begin(self._affordable(proposals))
            self._submit()

    def _used_up(self) -> bool:
        minutes = self._budget.minutes
        return not self._affords(1, 1) or (minutes is not None and self._spent.seconds >= 60 * minutes)

    def _affords(self, n_evaluations: int, n_tokens: int) -> bool:
        """Whether so much more may be begun."""
        evaluations, tokens = self._budget.evaluations, self._budget.tokens
        n_evaluations += len(self._asked)
        n_tokens += self._n_tokens
        return (evaluations is None or n_evaluations <= evaluations) and (
            tokens is None or n_tokens <= tokens
        )

    def _affordable(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """The proposals up to the first that would exceed the budget; notes whether the controller goes in circles."""
        new: dict[Key, int] = {}
        for i, proposal in enumerate(proposals):
            if proposal.key in self._asked or proposal.key in new:
                self._n_known_in_a_row += 1
                continue
            n_tokens = proposal.fidelity.n_tokens
            if not self._affords(len(new) + 1, sum(new.values()) + n_tokens):
                self._reason = self._reason or "budget"
                return list(proposals[:i])
            new[proposal.key] = n_tokens
            self._n_known_in_a_row = 0
        if self._n_known_in_a_row >= MAX_KNOWN_IN_A_ROW:
            self._reason = self._reason or "exhausted"
        return list(proposals)

    def _begin(self, proposals: list[Proposal]) -> None:
        """Queue jobs for what is new to the study, or tell at once if nothing is missing."""
        groups: dict[Fidelity, list[str]] = {}
        new_round = _Round(proposals, set())
        for proposal in proposals:
            key = proposal.key
            group = groups.setdefault(proposal.fidelity, [])  # in the order of all, known or not
            if self._study.lookup(key) is None:
                if key not in self._waiting:
                    group.append(proposal.candidate.text)
                if key not in new_round.missing:
                    new_round.missing.add(key)
                    self._waiting.setdefault(key, []).append(new_round)
            self._n_tokens += proposal.fidelity.n_tokens if key not in self._asked else 0
            self._asked.add(key)
        for fidelity, candidates in groups.items():
            for i in range(0, len(candidates), self._batch):
                self._queue.append(Job(self._n_jobs, tuple(candidates[i : i + self._batch]), fidelity))
                self._n_jobs += 1
        if not new_round.missing:
            self._tell(new_round)

    def _submit(self) -> None:
        while self._queue and self._executor.n_free and self._reason != "stopped":
            self._executor.submit(self._queue.popleft())

    def _receive(self) -> None:
        """Wait for results, keep them, and tell the rounds that are complete by them."""
        measurements: list[Measurement] = []
        for job, results in self._executor.wait():
            if [(m.candidate, m.fidelity) for m in results] != [(c, job.fidelity) for c in job.candidates]:
                raise RuntimeError(
                    f"Expected one measurement a candidate of job {job.number}, in order, got {len(results)} for "
                    f"{len(job.candidates)} candidates at {job.fidelity.text}, or others. Mend the evaluator."
                )
            measurements += results
        for trial in self._study.append(measurements):
            key = trial.measurement.key
            for waiting in self._waiting.pop(key):
                waiting.missing.discard(key)
                if not waiting.missing:
                    self._tell(waiting)

    def _tell(self, complete: _Round) -> None:
        found = [self._study.lookup(proposal.key) for proposal in complete.proposals]
        trials = [trial for trial in found if trial is not None]  # all of them
        new = list({t.measurement.key: t for t in trials if t.measurement.key not in self._told}.values())
        self._told.update(trial.measurement.key for trial in new)
        self._n_tokens += sum(t.measurement.n_tokens - t.measurement.fidelity.n_tokens for t in new)
        self._spent = self._spent.plus(new)
        if trials:
            self._controller.tell(trials)
        if new:
            for observer in self._observers:
                observer.on_trials(new, self._spent)
