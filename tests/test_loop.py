"""The loop of a search: what is measured, when it ends, and that it continues as if it had never been killed."""

from __future__ import annotations

import signal

import pytest

from secateur.search.budget import Budget
from secateur.search.controller import Controller, Proposal
from secateur.search.loop.ledger import MAX_KNOWN_IN_A_ROW
from secateur.search.loop.loop import Observer, Search
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity
from tests.toy import LARGE, SMALL, SPACE, ToyEvaluator, child, search

BUDGETS = [Budget(evaluations=50), Budget(tokens=9000), Budget(minutes=0.2)]


@pytest.mark.parametrize("die_at", [1, 33])
def test_a_killed_and_continued_search_ends_as_an_unbroken_one(tmp_path, die_at):
    outcome, unbroken, controller, _ = search(tmp_path / "unbroken", BUDGETS[0])
    code = f"search(directory, Budget(evaluations=50), evaluator=ToyEvaluator(SPACE, die_at={die_at}))"
    assert child(code, tmp_path / "killed").wait() == -signal.SIGKILL
    n_before = len(Study.open(tmp_path / "killed").trials)
    again, continued, replayed, evaluator = search(tmp_path / "killed", BUDGETS[0])
    assert continued.trials == unbroken.trials
    assert again == outcome
    assert replayed.history == controller.history
    assert evaluator.n_evaluations == len(unbroken.trials) - n_before


@pytest.mark.parametrize("budget", BUDGETS, ids=["evaluations", "tokens", "minutes"])
def test_a_search_continues_the_same_from_any_line_even_a_torn_one(tmp_path, budget):
    outcome, unbroken, controller, _ = search(tmp_path / "a", budget)
    assert outcome.reason == "budget"
    search(tmp_path / "b", budget)
    path = tmp_path / "b" / "measurements.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for n_lines in range(0, len(lines), 5):
        path.write_bytes(b"".join(lines[:n_lines]) + lines[n_lines][:20])
        again, continued, replayed, evaluator = search(tmp_path / "b", budget)
        assert continued.trials == unbroken.trials
        assert again == outcome
        assert replayed.history == controller.history
        assert evaluator.n_evaluations == len(lines) - n_lines


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(tmp_path):
    _, whole, _, _ = search(tmp_path / "whole", Budget(evaluations=80))
    _, first, _, _ = search(tmp_path / "parts", Budget(evaluations=33))
    assert len(first.trials) == 33
    _, second, _, evaluator = search(tmp_path / "parts", Budget(evaluations=80))
    assert second.trials == whole.trials
    assert evaluator.n_evaluations == 80 - 33


def test_a_finished_search_run_again_measures_nothing(tmp_path):
    before, *_ = search(tmp_path, BUDGETS[0])
    after, _, _, evaluator = search(tmp_path, BUDGETS[0])
    assert evaluator.calls == []
    assert after == before


@pytest.mark.parametrize("n_evaluations", [1, 2, 3, 20, 21])
def test_evaluations_are_met_exactly_baselines_included(tmp_path, n_evaluations):
    outcome, study, _, _ = search(tmp_path, Budget(evaluations=n_evaluations))
    assert len(study.trials) == max(n_evaluations, 2)  # dense and uniform, whatever the budget
    assert outcome.spent.evaluations == len(study.trials)


@pytest.mark.parametrize("n_tokens", [600, 1000, 5000])
def test_tokens_are_not_exceeded_and_nearly_used_up(tmp_path, n_tokens):
    outcome, study, _, _ = search(tmp_path, Budget(tokens=n_tokens))
    assert n_tokens - 256 < outcome.spent.tokens <= n_tokens
    assert outcome.spent == study.spent


def test_minutes_end_the_search_after_the_round_that_uses_them_up(tmp_path):
    outcome, *_ = search(tmp_path, Budget(minutes=0.1))  # 6 s; an evaluation reports 0.25 s, a round has 6
    assert 6 <= outcome.spent.seconds < 6 + 6 * 0.25


def test_baselines_come_first_at_the_largest_fidelity_and_jobs_are_no_larger_than_a_batch(tmp_path):
    _, study, _, evaluator = search(tmp_path, BUDGETS[0], batch=4)
    assert [t.measurement.key for t in study.trials[:2]] == [
        ("0" * 10, LARGE.text),
        ("0000011111", LARGE.text),
    ]
    assert all(len(set(candidates)) == len(candidates) <= 4 for candidates, _ in evaluator.calls)


class Listed(Controller):
    """Proposes what it is given, a list an ask; remembers what it is told."""

    def __init__(self, *rounds: list[Proposal]) -> None:
        self.rounds = list(rounds)
        self.told: list[list[tuple[str, str]]] = []

    def ask(self, n):
        return self.rounds.pop(0) if self.rounds else []

    def tell(self, trials):
        self.told.append([trial.measurement.key for trial in trials])


def propose(text: str, fidelity: Fidelity = SMALL) -> Proposal:
    return Proposal(SPACE.parse(text), fidelity)


def test_rounds_are_told_whole_in_the_order_of_their_proposals_and_known_ones_cost_nothing(tmp_path):
    a, b, c = "1010101010", "0101010101", "1001100110"
    first = [propose(a), propose(b, LARGE), propose(a), propose(c)]
    second = [propose(b, LARGE), propose(a)]
    controller = Listed(first, second)
    outcome, study, _, evaluator = search(tmp_path, Budget(evaluations=100), controller=controller)
    assert controller.told[1:] == [[p.key for p in first], [p.key for p in second]]
    assert evaluator.calls[1:] == [((a, c), SMALL), ((b,), LARGE)]
    assert outcome.reason == "finished"
    assert outcome.spent.evaluations == len(study.trials) == 5


def test_a_controller_that_goes_round_in_circles_is_ended(tmp_path):
    known = [propose("1010101010")] * 10
    controller = Listed(*[known] * MAX_KNOWN_IN_A_ROW)
    outcome, study, _, _ = search(tmp_path, Budget(evaluations=100), controller=controller)
    assert outcome.reason == "exhausted"
    assert len(study.trials) == 3
    assert len(controller.told) == 1 + MAX_KNOWN_IN_A_ROW // 10 + 1


def test_a_controller_that_finds_something_new_now_and_then_is_not(tmp_path):
    known, new = propose("1010101010"), [f"{i:010b}" for i in range(40)]
    rounds = [
        [known] * 99 + [propose(text)] for text in new
    ]  # 40 × 99 known ones, but never so many in a row
    outcome, study, *_ = search(tmp_path, Budget(evaluations=1000), controller=Listed(*rounds))
    assert outcome.reason == "finished"
    assert len(study.trials) == 2 + 1 + 40


class Third(ToyEvaluator):
    """Does something in its third batch."""

    def evaluate(self, candidates, fidelity):
        results = super().evaluate(candidates, fidelity)
        if len(self.calls) == 3:
            self.act()
        return results


def test_a_stopped_search_keeps_the_running_batch_and_continues(tmp_path):
    _, unbroken, _, _ = search(tmp_path / "unbroken", BUDGETS[0])
    evaluator = Third(SPACE)

    def on_ready(loop: Search) -> None:
        evaluator.act = loop.stop

    outcome, study, *_ = search(tmp_path / "run", BUDGETS[0], evaluator=evaluator, on_ready=on_ready)
    assert outcome.reason == "stopped"
    assert len(evaluator.calls) == 3
    assert len(study.trials) == evaluator.n_evaluations
    _, study, _, _ = search(tmp_path / "run", BUDGETS[0])
    assert study.trials == unbroken.trials


def test_an_exception_of_the_evaluator_comes_out_and_the_study_continues(tmp_path):
    _, unbroken, _, _ = search(tmp_path / "unbroken", BUDGETS[0])
    failing = Third(SPACE)
    failing.act = lambda: 1 // 0
    with pytest.raises(ZeroDivisionError):
        search(tmp_path / "run", BUDGETS[0], evaluator=failing)
    _, study, _, _ = search(tmp_path / "run", BUDGETS[0])
    assert study.trials == unbroken.trials


def test_an_evaluator_that_answers_something_else_is_named(tmp_path):
    class Wrong(ToyEvaluator):
        def evaluate(self, candidates, fidelity):
            return super().evaluate(candidates, fidelity)[::-1]

    with pytest.raises(RuntimeError, match="one measurement a candidate of job 0"):
        search(tmp_path, BUDGETS[0], evaluator=Wrong(SPACE))
    assert Study.open(tmp_path).trials == []


def test_observers_see_every_trial_of_the_run_once(tmp_path):
    class Watcher(Observer):
        def __init__(self):
            self.seen, self.events = [], []

        def on_start(self, n_known, budget):
            self.events.append(n_known)

        def on_trials(self, trials, spent):
            self.seen += trials
            assert spent.evaluations == len(self.seen)

        def on_end(self, outcome):
            self.events.append(outcome.reason)

    search(tmp_path, Budget(evaluations=20))
    watcher = Watcher()
    _, study, _, _ = search(tmp_path, Budget(evaluations=40), observers=(watcher,))
    assert sorted(watcher.seen, key=lambda t: t.number) == study.trials
    assert watcher.events == [20, "budget"]
