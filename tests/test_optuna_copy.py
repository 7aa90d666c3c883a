"""The copy of a study that Optuna's tools read: in a journal in the run, or in a database."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import replace

import numpy as np
import pytest

from secateur.search.budget import Budget
from secateur.search.mirror.storages import storage_of
from secateur.search.results.front import non_dominated
from tests.mirrors import BOTH, address_of, assert_mirrored, closing, copy_of, mirrored, ours
from tests.toy import LARGE, SPACE, search, start


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
@BOTH
def test_optunas_best_trials_are_the_front_with_names_and_times(tmp_path, address_in, objectives):
    before, address = time.time(), address_in(tmp_path)
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


@BOTH
def test_the_copy_holds_the_trials_of_the_largest_fidelity(tmp_path, address_in):
    run, address = tmp_path / "run", address_in(tmp_path)
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
    storage = storage_of(tmp_path / "run", address_of(tmp_path))
    ours = storage.load()
    their_storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'theirs.db'}")
    theirs = optuna.create_study(storage=their_storage, study_name="theirs", directions=ours.directions)
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
    storage.close()
    their_storage.remove_session()
    their_storage.engine.dispose()


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


# --- copies that were damaged, or are of another study ---


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
