"""The loop over several workers: asynchronous by a log of asks, deterministic in rounds."""

from __future__ import annotations

import json

import pytest

from secateur.search.budget import Budget
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.study.asks import Ask, AskLog
from secateur.search.study.study import Study
from tests.toy import LARGE, SMALL, SPACE, Pool, ToyController, ToyEvaluator, search, search_pool

BUDGET = Budget(evaluations=60)


def toy() -> ToyController:
    return ToyController(SPACE, (64, 256), seed=3)


def evolution(seed: int = 0):
    row = CONTROLLERS["evolution"]
    return row.build(SPACE, (SMALL, LARGE), seed, row.settings(kind="evolution", offspring=6))


@pytest.mark.parametrize("make", [toy, evolution])
@pytest.mark.parametrize("budget", [BUDGET, Budget(tokens=9000)], ids=["evaluations", "tokens"])
def test_a_search_that_breaks_off_anywhere_measures_nothing_twice_and_ends_with_as_many_trials(
    tmp_path, make, budget
):
    whole = Pool(ToyEvaluator(SPACE))
    outcome, unbroken = search_pool(tmp_path / "whole", budget, whole, make())
    assert outcome.reason in {"budget", "finished"}
    for break_at in range(0, whole.n_done, 5):
        directory = tmp_path / str(break_at)
        first = Pool(ToyEvaluator(SPACE), break_at=break_at)
        with pytest.raises(BrokenPipeError):
            search_pool(directory, budget, first, make())
        n_before = len(Study.open(directory).trials)
        second = Pool(ToyEvaluator(SPACE), seed=1)
        outcome, study = search_pool(directory, budget, second, make())
        assert second.evaluator.n_evaluations == len(study.trials) - n_before
        assert first.evaluator.n_evaluations == n_before
        assert outcome.spent.evaluations == len(study.trials)
        if budget.evaluations and make is toy:
            assert len(study.trials) == len(unbroken.trials) == budget.evaluations


def test_a_continued_controller_was_told_the_same_in_the_same_order(tmp_path):
    first = toy()
    with pytest.raises(BrokenPipeError):
        search_pool(tmp_path, BUDGET, Pool(ToyEvaluator(SPACE), break_at=20), first)
    n_told = len(first.history)
    assert n_told > 20
    second = toy()
    search_pool(tmp_path, BUDGET, Pool(ToyEvaluator(SPACE), seed=5), second)
    assert second.history[:n_told] == first.history


def test_a_finished_search_run_again_measures_nothing_and_a_larger_budget_goes_on(tmp_path):
    before, _ = search_pool(tmp_path, BUDGET, Pool(ToyEvaluator(SPACE)), toy())
    pool = Pool(ToyEvaluator(SPACE), seed=2)
    after, _ = search_pool(tmp_path, BUDGET, pool, toy())
    assert after == before
    assert pool.evaluator.calls == []
    _, study = search_pool(tmp_path, Budget(evaluations=90), pool, toy())
    assert pool.evaluator.n_evaluations == 30
    assert len(study.trials) == 90


def test_nobody_waits_for_a_round(tmp_path):
    pool = Pool(ToyEvaluator(SPACE), n_workers=7)
    busy: list[int] = []
    wait = pool.wait

    def spying():
        busy.append(pool.n_pending)
        return wait()

    pool.wait = spying
    search_pool(tmp_path, BUDGET, pool, evolution())
    assert set(busy[:-7]) == {7}


def test_all_that_is_measured_is_told_once_and_baselines_are_among_it(tmp_path):
    controller = toy()
    _, study = search_pool(tmp_path, BUDGET, Pool(ToyEvaluator(SPACE)), controller)
    assert {(t.number, t.measurement.candidate) for t in study.trials} == set(controller.history)
    baselines = {(c.text, LARGE.text) for c in SPACE.baselines().values()}
    assert baselines <= {t.measurement.key for t in study.trials}


@pytest.mark.parametrize("make", [toy, evolution])
@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_deterministic_trials_do_not_depend_on_the_workers(tmp_path, make, n_workers):
    _, local, *_ = search(tmp_path / "local", BUDGET, controller=make())
    _, study = search_pool(
        tmp_path / "pool", BUDGET, Pool(ToyEvaluator(SPACE), n_workers), make(), deterministic=True
    )
    assert study.trials == local.trials


def test_a_deterministic_search_over_workers_continues_after_it_broke_off(tmp_path):
    _, local, *_ = search(tmp_path / "local", BUDGET, controller=toy())
    for break_at in range(0, 25, 4):
        directory = tmp_path / str(break_at)
        with pytest.raises(BrokenPipeError):
            search_pool(
                directory, BUDGET, Pool(ToyEvaluator(SPACE), break_at=break_at), toy(), deterministic=True
            )
        _, study = search_pool(
            directory, BUDGET, Pool(ToyEvaluator(SPACE), seed=8), toy(), deterministic=True
        )
        assert study.trials == local.trials


def test_stopping_keeps_what_is_running_and_asks_for_nothing_more(tmp_path):
    class Stopping(ToyEvaluator):
        def evaluate(self, candidates, fidelity):
            if len(self.calls) == 5:
                self.stop()
            return super().evaluate(candidates, fidelity)

    pool = Pool(Stopping(SPACE))
    outcome, study = search_pool(
        tmp_path, BUDGET, pool, toy(), on_ready=lambda loop: setattr(pool.evaluator, "stop", loop.stop)
    )
    assert outcome.reason == "stopped"
    assert len(pool.evaluator.calls) == 6 + 3  # what was running
    assert len(study.trials) == pool.evaluator.n_evaluations
    _, study = search_pool(tmp_path, BUDGET, Pool(ToyEvaluator(SPACE)), toy())
    assert len(study.trials) == 60


def test_another_controller_begins_anew_and_finds_what_is_known(tmp_path):
    search_pool(tmp_path, BUDGET, Pool(ToyEvaluator(SPACE)), toy(), about={"controller": "one"})
    pool = Pool(ToyEvaluator(SPACE))
    outcome, study = search_pool(tmp_path, BUDGET, pool, toy(), about={"controller": "two"})
    assert outcome.spent.evaluations == 60
    assert pool.evaluator.n_evaluations == len(study.trials) - 60 < 60
    lines = [json.loads(line) for line in (tmp_path / AskLog.NAME).read_text().splitlines()]
    assert [line["about"] for line in lines if "about" in line] == [
        {"controller": "one"},
        {"controller": "two"},
    ]


def test_a_log_of_asks_is_read_back_without_its_torn_end(tmp_path):
    path = tmp_path / "asks.jsonl"
    log = AskLog(path, {"seed": 1}, 3)
    log.add(Ask(3, 8))
    log.add(Ask(5, 2))
    log.close()
    with path.open("a") as file:
        file.write('{"told": 9, "n"')
    again = AskLog(path, {"seed": 1}, 7)
    assert (again.first, list(again.asks)) == (3, [Ask(3, 8), Ask(5, 2)])
    again.add(Ask(7, 1))
    again.close()
    assert list(AskLog(path, {"seed": 1}, 7).asks) == [Ask(3, 8), Ask(5, 2), Ask(7, 1)]


def test_a_log_that_knows_more_than_the_study_is_not_repeated(tmp_path):
    path = tmp_path / "asks.jsonl"
    log = AskLog(path, {}, 0)
    log.add(Ask(9, 4))
    log.close()
    again = AskLog(path, {}, 5)  # the study has lost its end
    assert (again.first, list(again.asks)) == (5, [])
