"""What every executor keeps to, run over the registry: a new row is tested by what is here."""

from __future__ import annotations

import pytest

from secateur.search.executor import Executor, Job, measure_all
from secateur.search.executors.registry import EXECUTORS
from secateur.spaces.measurement import Fidelity
from tests.toy import OneMax, Ready, ToyEvaluator

SMALL, LARGE = Fidelity("search", 64), Fidelity("search", 256)
JOBS = [Job(0, ("00001111", "11110000"), SMALL), Job(1, ("00001111",), LARGE), Job(2, ("01010101",), SMALL)]


def make_evaluator() -> ToyEvaluator:
    return ToyEvaluator(OneMax())


# For each row of the registry the settings that it is tested with, and the fixture that it needs.
SETTINGS = {"local": {}, "ray": {"workers": 2}}
NEEDS = {"ray": "ray_cluster"}


@pytest.fixture(params=sorted(EXECUTORS), scope="module")
def executor(request):
    if request.param in NEEDS:
        request.getfixturevalue(NEEDS[request.param])
    row = EXECUTORS[request.param]
    with row.build(row.settings(**SETTINGS[request.param]), Ready(make_evaluator())) as made:
        yield made


def run_all(executor: Executor, jobs: list[Job]) -> dict[Job, list]:
    results, waiting = {}, list(jobs)
    while waiting or executor.n_pending:
        while waiting and executor.n_free:
            executor.submit(waiting.pop(0))
        for job, measurements in executor.wait():
            assert job not in results
            results[job] = measurements
    return results


def test_every_job_is_handed_back_once_in_the_order_of_its_candidates(executor):
    results = run_all(executor, JOBS)
    assert set(results) == set(JOBS)
    for job, measurements in results.items():
        assert [(m.candidate, m.fidelity) for m in measurements] == [
            (text, job.fidelity) for text in job.candidates
        ]


def test_measurements_equal_those_of_the_evaluator_itself(executor):
    for job, measurements in run_all(executor, JOBS).items():
        alone = make_evaluator().evaluate(job.candidates, job.fidelity)
        assert [m.values for m in measurements] == [m.values for m in alone]
        assert [m.infeasible for m in measurements] == [m.infeasible for m in alone]


def test_places_add_up(executor):
    n_places = executor.n_free
    assert n_places > 0
    assert executor.n_pending == 0
    for i in range(n_places):
        executor.submit(Job(i, ("00001111",), SMALL))
        assert executor.n_free + executor.n_pending == n_places
    with pytest.raises(RuntimeError, match="Expected a free place"):
        executor.submit(Job(n_places, ("00001111",), SMALL))
    while executor.n_pending:
        executor.wait()
    assert executor.n_free == n_places


def test_waiting_for_nothing_is_refused(executor):
    with pytest.raises(RuntimeError, match="Expected a pending job"):
        executor.wait()


def test_a_job_has_a_size_and_the_staff_is_known(executor):
    assert executor.job_size >= 1
    run_all(executor, JOBS)
    staff = executor.worker_status
    assert staff.workers >= 1
    assert (staff.busy, staff.lost, staff.troubles) == (0, 0, ())


def test_many_candidates_are_measured_outside_a_search_in_jobs(executor):
    texts = [f"0{i:07b}" for i in range(10)]
    parts = list(measure_all(executor, texts, SMALL, size=4))
    assert sorted(m.candidate for part in parts for m in part) == sorted(texts)
    assert max(len(part) for part in parts) >= 2


def test_closing_drops_pending_jobs_and_may_be_repeated(executor):  # the last one that uses it
    executor.submit(JOBS[0])
    executor.close()
    executor.close()
    assert executor.n_pending == 0


@pytest.mark.parametrize("kind", sorted(EXECUTORS))
def test_settings_name_their_kind_and_a_batch(kind):
    settings = EXECUTORS[kind].settings()
    assert settings.kind == kind
    assert settings.batch > 0
    assert EXECUTORS[kind].summary


def test_the_local_executor_makes_its_evaluator_once_and_late():
    made = []

    class Making(Ready):
        def __call__(self, directories):
            made.append(self.evaluator)
            return made[-1]

    row = EXECUTORS["local"]
    with row.build(row.settings(), Making(make_evaluator())) as executor:
        assert made == []
        run_all(executor, JOBS)
    assert len(made) == 1


def test_the_local_executor_lets_exceptions_out_and_goes_on():
    class Failing(ToyEvaluator):
        def evaluate(self, candidates, fidelity):
            if fidelity == LARGE:
                raise MemoryError("too large")
            return super().evaluate(candidates, fidelity)

    with EXECUTORS["local"].build(EXECUTORS["local"].settings(), Ready(Failing(OneMax()))) as executor:
        executor.submit(JOBS[1])
        with pytest.raises(MemoryError):
            executor.wait()
        assert run_all(executor, [JOBS[0]])
