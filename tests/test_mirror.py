"""The mirror that Optuna's tools read."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.search.mirror import Mirror
from secateur.search.settings import Budget
from tests.toy import LARGE, SPACE, search, start


def mirrored(directory: Path) -> list:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = JournalStorage(JournalFileBackend(str(directory / "optuna.log")))
    return optuna.load_study(study_name="secateur", storage=storage).get_trials()


def test_the_mirror_holds_the_trials_of_the_largest_fidelity(tmp_path):
    search(tmp_path, Budget(evaluations=50))
    with start(tmp_path) as study:
        Mirror(study, SPACE, ["loss", "sparsity"], LARGE).catch_up()
        ours = [t for t in study.trials if t.measurement.fidelity == LARGE]
    copies = mirrored(tmp_path)
    assert [c.user_attrs["number"] for c in copies] == [t.number for t in ours]
    for copy, trial in zip(copies, ours, strict=True):
        m = trial.measurement
        assert tuple(copy.params.values()) == SPACE.disassemble(SPACE.parse(m.candidate))
        if m.infeasible is None:
            assert copy.values == [m.values["loss"], m.values["sparsity"]]
        else:
            assert copy.state.name == "FAIL"
            assert copy.user_attrs["infeasible"] == m.infeasible
    assert {c.state.name for c in copies} == {"FAIL", "COMPLETE"}


@pytest.mark.parametrize(
    "damage", ["none", "torn", "garbage", "empty", "no slots", "lock", "other objectives"]
)
def test_the_mirror_catches_up_whatever_has_happened_to_it(tmp_path, damage):
    search(tmp_path, Budget(evaluations=20))
    path = tmp_path / "optuna.log"
    with start(tmp_path) as study:
        Mirror(
            study, SPACE, ["loss"] if damage == "other objectives" else ["loss", "params"], LARGE
        ).catch_up()
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
        mirror = Mirror(study, SPACE, ["loss", "params"], LARGE)
        mirror.catch_up()
        mirror.catch_up()
        numbers = [t.number for t in study.trials if t.measurement.fidelity == LARGE]
    assert [c.user_attrs["number"] for c in mirrored(tmp_path)] == numbers
    if damage in ("none", "torn", "lock"):
        assert path.read_bytes().startswith(whole[: whole[:-9].rfind(b"\n")])  # continued, not made anew


def test_a_mirror_that_cannot_be_written_does_not_hold_up_the_search(tmp_path):
    with start(tmp_path) as study:
        mirror = Mirror(study, SPACE, ["loss", "params"], LARGE)
        (tmp_path / "optuna.log").mkdir()
        mirror.on_start(0, Budget(evaluations=1))
        mirror.on_trials([], study.spent)
    assert "optuna.log" in mirror.failure
