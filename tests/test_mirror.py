"""The mirror that Optuna's tools read: a journal in the run, or a database."""

from __future__ import annotations

import gc
import json
import sqlite3
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from secateur.search.budget import Budget
from secateur.search.executors.local import LocalExecutor, LocalSettings
from secateur.search.loop.loop import Search
from secateur.search.mirror.mirror import Mirror
from secateur.search.mirror.optuna_copy import OptunaCopy
from secateur.search.mirror.storages import storage_of
from secateur.search.results.front import non_dominated
from tests.toy import LARGE, SPACE, Ready, ToyController, ToyEvaluator, child, search, start


def copy_of(study, address=None, objectives=("loss", "params")):
    return OptunaCopy(study, SPACE, objectives, LARGE, storage_of(study.directory, address))


@contextmanager
def closing(copy):
    try:
        yield copy
    finally:
        copy.close()
        gc.collect()  # a connection that was forgotten would complain now


def address_of(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'shared.db'}"


def ours(study):
    return [trial for trial in study.trials if trial.measurement.fidelity == LARGE]


def mirrored(directory: Path, address=None) -> list:
    """What Optuna itself reads."""
    storage = storage_of(directory, address)
    found = storage.load().get_trials()
    storage.close()
    return found


def assert_mirrored(study, address=None):
    copies = mirrored(study.directory, address)
    assert [c.user_attrs["number"] for c in copies] == [t.number for t in ours(study)]
    assert [c.number for c in copies] == list(range(len(copies)))
    for copy, trial in zip(copies, ours(study), strict=True):
        m = trial.measurement
        assert copy.params == SPACE.to_parameters(SPACE.parse(m.candidate))
        assert copy.user_attrs["candidate"] == m.candidate
        if m.infeasible is None:
            assert copy.values == pytest.approx([m.values["loss"], m.values["params"]], rel=1e-12)
        else:
            assert copy.user_attrs["infeasible"] == m.infeasible
        assert copy.state.name == ("COMPLETE" if m.infeasible is None else "FAIL")
        assert copy.datetime_complete is not None


def equal_to(study, numbers):
    """Measurements of other candidates with the values of these trials, and one whose sparsity differs in no digit."""
    texts = [SPACE.sample(np.random.default_rng(seed), 0).text for seed in range(40)]
    known = {trial.measurement.candidate for trial in study.trials}
    new = iter([text for text in dict.fromkeys(texts) if text not in known])
    found = [replace(study.trials[number].measurement, candidate=next(new)) for number in numbers]
    values = dict(found[0].values)
    values |= {"params": values["params"] * 1.0001, "loss": values["loss"] + 1e-9}
    return [*found, replace(found[0], candidate=next(new), values=values)]


@pytest.mark.parametrize("objectives", [("loss", "params"), ("params", "loss")])
def test_optunas_best_trials_are_the_front_with_names_and_times(tmp_path, address, objectives):
    before = time.time()
    search(tmp_path, Budget(evaluations=20))
    with start(tmp_path) as study:
        front = non_dominated(study.trials, objectives, LARGE)
        with closing(copy_of(study, address, objectives)) as copy:
            copy.catch_up()
        study.append(equal_to(study, [trial.number for trial in front]))
        with closing(copy_of(study, address, objectives)) as copy:
            copy.catch_up()
        storage = storage_of(study.directory, address)
        seen = storage.load()
        assert {t.user_attrs["number"] for t in seen.best_trials} == {t.number for t in front}
        assert {t.number for t in non_dominated(study.trials, objectives, LARGE)} == {t.number for t in front}
        assert seen.metric_names == list(objectives)
        for found in seen.get_trials():
            m = study.trials[found.user_attrs["number"]].measurement
            assert found.datetime_start.timestamp() == pytest.approx(m.started, abs=1e-3)
            assert found.datetime_complete.timestamp() == pytest.approx(m.ended, abs=1e-3)
            assert before - 1 < m.started <= m.ended < time.time() + 1
            assert m.ended - m.started >= m.seconds - 1e-3
        storage.close()


@pytest.fixture(params=["journal", "database"])
def address(request, tmp_path):
    return None if request.param == "journal" else address_of(tmp_path)


# --- the copy ---


def test_the_copy_holds_the_trials_of_the_largest_fidelity(tmp_path, address):
    run = tmp_path / "run"
    for n in (20, 50):
        search(run, Budget(evaluations=n))
        with start(run) as study, closing(copy_of(study, address)) as copy:
            assert copy.n_missing == len(ours(study))
            copy.catch_up()
            copy.catch_up()
            assert copy.n_missing == 0
            assert_mirrored(study, address)
    assert {c.state.name for c in mirrored(run, address)} == {"FAIL", "COMPLETE"}


@pytest.fixture(params=["UTC", "Asia/Tokyo"])
def _zone(request, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("_zone")
def test_a_batch_in_a_database_is_what_optuna_would_write(tmp_path):
    """Our rows go into Optuna's tables directly; this notices when Optuna changes them."""
    import optuna

    search(tmp_path / "run", Budget(evaluations=50))
    rows = {}
    with start(tmp_path / "run") as study, closing(copy_of(study, address_of(tmp_path))) as copy:
        copy.catch_up()
    ours = storage_of(tmp_path / "run", address_of(tmp_path)).load()
    theirs = optuna.create_study(
        storage=f"sqlite:///{tmp_path / 'theirs.db'}", study_name="theirs", directions=ours.directions
    )
    theirs.add_trials(ours.trials)
    for name in ("shared.db", "theirs.db"):
        with sqlite3.connect(tmp_path / name) as connection:
            rows[name] = {
                table: sorted(map(repr, connection.execute(f"select {columns} from {table}")))
                for table, columns in (
                    ("trials", "trial_id, number, study_id, state, datetime_start, datetime_complete"),
                    ("trial_values", "trial_id, objective, value, value_type"),
                    ("trial_params", "trial_id, param_name, param_value, distribution_json"),
                    ("trial_user_attributes", "trial_id, key, value_json"),
                )
            }
        connection.close()
    assert rows["shared.db"]["trials"]
    assert rows["shared.db"] == rows["theirs.db"]
    for study in (ours, theirs):
        study._storage._backend.engine.dispose()


@pytest.mark.usefixtures("_zone")
@pytest.mark.parametrize("objectives", [["loss", "params"], ["loss"]])
def test_a_batch_in_the_journal_is_what_optuna_would_write(tmp_path, objectives):
    """Our lines go into Optuna's journal directly; this notices when Optuna changes them."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    search(tmp_path, Budget(evaluations=50))
    with start(tmp_path) as study, closing(copy_of(study, objectives=objectives)) as copy:
        copy.catch_up()
    ours = storage_of(tmp_path, None).load()
    theirs = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(tmp_path / "theirs.log"))),
        study_name="theirs",
        directions=ours.directions,
    )
    theirs.add_trials(ours.trials)
    trials = {}
    for name in ("optuna.log", "theirs.log"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        trials[name] = [line | {"worker_id": ""} for line in lines if line["op_code"] == 4]
    assert {line["state"] for line in trials["optuna.log"]} == {1, 3}  # complete and failed
    assert trials["optuna.log"] == trials["theirs.log"]


@pytest.mark.parametrize(
    "damage", ["none", "torn", "garbage", "empty", "no slots", "lock", "other objectives"]
)
def test_the_journal_catches_up_whatever_has_happened_to_it(tmp_path, damage):
    search(tmp_path, Budget(evaluations=20))
    path = tmp_path / "optuna.log"
    with start(tmp_path) as study:
        copy_of(study, objectives=["loss"] if damage == "other objectives" else ["loss", "params"]).catch_up()
    whole = path.read_bytes()
    spoilt = {
        "torn": whole[:-9],
        "garbage": b"x\n" + whole,
        "empty": b"",
        "no slots": whole.split(b"\n")[0] + b"\n",
    }
    path.write_bytes(spoilt.get(damage, whole))
    if damage == "lock":
        path.with_name("optuna.log.lock").symlink_to(path)
    search(tmp_path, Budget(evaluations=50))
    with start(tmp_path) as study:
        copy_of(study).catch_up()
        assert_mirrored(study)
    if damage in ("none", "torn", "lock"):
        assert path.read_bytes().startswith(whole[: whole[:-9].rfind(b"\n")])  # continued, not made anew


def test_runs_of_one_name_share_a_database_without_meeting(tmp_path):
    address = address_of(tmp_path)
    runs = [tmp_path / parent / "run" for parent in "ab"]
    for run, n in zip(runs, (20, 30), strict=True):
        search(run, Budget(evaluations=n))
        with start(run) as study, closing(copy_of(study, address)) as copy:
            copy.catch_up()
    for run in runs:
        with start(run) as study:
            assert_mirrored(study, address)
    names = [(run / "optuna.name").read_text() for run in runs]
    assert all(name.startswith("run-") for name in names)
    assert names[0] != names[1]


@pytest.mark.parametrize("change", ["objectives", "a copied run", "a stranger's trial", "name"])
def test_what_cannot_be_continued_stays_in_the_database(tmp_path, change):
    import optuna

    address, run, other = address_of(tmp_path), tmp_path / "run", tmp_path / "other"
    search(run, Budget(evaluations=20))
    with start(run) as study, closing(copy_of(study, address)) as copy:
        copy.catch_up()
    before = optuna.get_all_study_names(address)
    if change == "a stranger's trial":
        optuna.load_study(storage=address, study_name=before[0]).add_trial(
            optuna.trial.create_trial(values=[0.0, 0.0])
        )
    if change == "name":
        (run / "optuna.name").unlink()
    if change == "a copied run":  # with the name of the other's study, and then trials of its own
        search(other, Budget(evaluations=20), batch=5)
        (other / "optuna.name").write_text((run / "optuna.name").read_text())
        run = other
    objectives = ("loss",) if change == "objectives" else ("loss", "params")
    with start(run) as study, closing(copy_of(study, address, objectives)) as copy:
        copy.catch_up()
        assert [c.user_attrs["number"] for c in mirrored(run, address)] == [t.number for t in ours(study)]
    assert len(set(optuna.get_all_study_names(address)) - set(before)) == 1
    assert set(before) < set(optuna.get_all_study_names(address))


# --- the thread ---


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
    assert not mirror._thread.is_alive()
    return outcome, study


class Outage:
    """A storage that refuses while it is down; `after` so many failed tries it is back, and `over` is set."""

    def __init__(self, storage, after=None):
        self._storage = storage
        self._after = after
        self.n_failed = 0
        self.over = threading.Event()
        if after == 0:
            self.over.set()

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def _fail(self):
        if self._after is None or self.n_failed < self._after:
            self.n_failed += 1
            if self.n_failed == self._after:
                self.over.set()
            raise ConnectionError("the database has gone away")

    def held(self):
        self._fail()
        return self._storage.held()


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
def test_a_mirror_follows_a_search_and_survives_an_outage(tmp_path, address, after):
    said = []
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
    assert all("optuna.log" in line for line in said)


def test_a_storage_that_hangs_does_not_hold_up_the_search(tmp_path):
    free, said, run = threading.Event(), [], tmp_path / "run"
    storage = storage_of(run, None)

    class Hangs(Outage):
        def held(self):
            free.wait()
            return self._storage.held()

    with start(run) as study:
        mirror = Mirror(copy_of(study), said.append, patience=0.01)
        mirror._copy.storage = Hangs(storage)
        with mirror:
            mirror.on_start(0, Budget(evaluations=1))
            outcome = search(tmp_path / "other", Budget(evaluations=50))[0]  # not waiting for anything
            study.append(
                [t.measurement for t in search(tmp_path / "other", Budget(evaluations=50))[1].trials]
            )
            mirror.on_trials(study.trials, study.spent)
        assert outcome.reason == "budget"
        assert f"lacks {len(ours(study))} trials" in said[0]
        free.set()
        mirror._thread.join()
        assert mirrored(run) == []  # it was given up, whatever comes later


def test_a_search_that_fails_ends_the_thread(tmp_path):
    said = []
    with start(tmp_path) as study:
        mirror = Mirror(copy_of(study), said.append)
        mirror.on_start(0, Budget(evaluations=1))
        with pytest.raises(ZeroDivisionError), mirror:
            raise ZeroDivisionError
    assert not mirror._thread.is_alive()
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
