"""The mirror of a search: a thread that follows it through outages, and holds nothing up."""

from __future__ import annotations

import gc
import threading

import pytest

from secateur.search.budget import Budget
from secateur.search.executors.local import LocalExecutor, LocalSettings
from secateur.search.loop.loop import Search
from secateur.search.mirror.mirror import Mirror
from secateur.search.mirror.optuna_copy import OptunaCopy
from secateur.search.mirror.storages import storage_of
from tests.mirrors import BOTH, Outage, address_of, assert_mirrored, copy_of, mirrored, ours
from tests.toy import LARGE, SPACE, Ready, ToyController, ToyEvaluator, child, search, start


def threads() -> list[threading.Thread]:
    """Those of mirrors, as long as they live."""
    return [thread for thread in threading.enumerate() if thread.name == "mirror"]


def mirrored_search(directory, storage, said, evaluator=None):
    """A toy search with a mirror that is tried again at once; the outcome and the study."""
    setup = Ready(evaluator or ToyEvaluator(SPACE))
    controller, budget = ToyController(SPACE, (64, 256), seed=3), Budget(evaluations=50)
    with start(directory) as study, LocalExecutor(LocalSettings(), setup) as executor:
        copy = OptunaCopy(study, SPACE, ("loss", "params"), LARGE, storage)
        with Mirror(copy, said.append, pause=0.001) as mirror:
            observers = [mirror]
            loop = Search(
                study, SPACE.baselines(), controller, executor, budget, LARGE, batch=6, observers=observers
            )
            outcome = loop.run()
    assert not threads()
    return outcome, study


class Outlasts(ToyEvaluator):
    """Measures a batch, and then no more until an outage is over: else a search would end before."""

    def __init__(self, outage: Outage) -> None:
        super().__init__(SPACE)
        self._outage, self._n_calls = outage, 0

    def evaluate(self, candidates, fidelity):
        self._n_calls += 1
        assert self._n_calls == 1 or self._outage.over.wait(60)
        return super().evaluate(candidates, fidelity)


@pytest.mark.parametrize("after", [0, 3])
@BOTH
def test_a_mirror_follows_a_search_and_survives_an_outage(tmp_path, address_in, after):
    said, address = [], address_in(tmp_path)
    storage = Outage(storage_of(tmp_path / "run", address), after)
    _, study = mirrored_search(tmp_path / "run", storage, said, Outlasts(storage))
    assert_mirrored(study, address)
    assert [("lags" in line, "caught up" in line) for line in said] == [(True, False), (False, True)] * (
        after > 0
    )
    gc.collect()


def test_an_outage_in_the_middle_leaves_nothing_twice(tmp_path):
    """A batch that fails after it was written, as when the connection breaks at the commit."""

    class Breaks(Outage):
        def held(self):
            return self._storage.held()

        def add(self, *batch):
            self._storage.add(*batch)
            self._fail()

    said, run, address = [], tmp_path / "run", address_of(tmp_path)
    storage = Breaks(storage_of(run, address), after=1)
    _, study = mirrored_search(run, storage, said, Outlasts(storage))
    assert_mirrored(study, address)
    assert ["lags" in said[0], "caught up" in said[1]] == [True, True]


def test_a_storage_that_stays_away_is_said_once_and_at_the_end(tmp_path):
    said, run = [], tmp_path / "run"
    outcome, study = mirrored_search(run, Outage(storage_of(run, address_of(tmp_path))), said)
    assert outcome.reason == "budget"
    assert len(said) == 2
    assert "lags: the database has gone away" in said[0]
    assert f"lacks {len(ours(study))} trials (the database has gone away)" in said[1]
    mirrored_search(run, storage_of(run, address_of(tmp_path)), said)  # the same command again
    assert len(said) == 2
    assert_mirrored(study, address_of(tmp_path))


def test_a_journal_that_cannot_be_written_does_not_hold_up_the_search(tmp_path):
    said, run = [], tmp_path / "run"
    start(run).close()
    (run / "optuna.log").mkdir()
    outcome, _ = mirrored_search(run, storage_of(run, None), said)
    assert outcome.reason == "budget"
    assert ["lags" in said[0], "lacks" in said[1]] == [True, True]
    assert all("optuna.log" in line for line in said)


def test_a_storage_that_hangs_does_not_hold_up_the_search(tmp_path):
    free, said, run = threading.Event(), [], tmp_path / "run"

    class Hangs(Outage):
        def held(self):
            free.wait()
            return self._storage.held()

    with start(run) as study:
        copy = copy_of(study)
        copy.storage = Hangs(copy.storage)
        with Mirror(copy, said.append, patience=0.01) as mirror:
            mirror.on_start(0, Budget(evaluations=1))
            # Not waiting for anything.
            outcome, other, _, _ = search(tmp_path / "other", Budget(evaluations=50))
            study.append([trial.measurement for trial in other.trials])
            mirror.on_trials(study.trials, study.spent)
        assert outcome.reason == "budget"
        assert f"lacks {len(ours(study))} trials" in said[0]
        [thread] = threads()
        free.set()
        thread.join()
        assert mirrored(run) == []  # it was given up, whatever comes later


def test_a_search_that_fails_ends_the_thread(tmp_path):
    said = []
    with start(tmp_path) as study:
        mirror = Mirror(copy_of(study), said.append)
        mirror.on_start(0, Budget(evaluations=1))
        with pytest.raises(ZeroDivisionError), mirror:
            raise ZeroDivisionError
    assert not threads()
    assert said == []


def test_a_driver_that_is_killed_leaves_a_mirror_that_catches_up(tmp_path):
    address = address_of(tmp_path)
    code = f"""
    from tests.test_mirror import *
    mirrored_search(directory, storage_of(directory, {address!r}), [], ToyEvaluator(SPACE, die_at=30))
    """
    run = tmp_path / "run"
    assert child(code, run).wait(60) == -9
    said = []
    _, study = mirrored_search(run, storage_of(run, address), said)
    assert_mirrored(study, address)
    assert said == []
