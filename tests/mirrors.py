"""Mirrors of toy searches: their copies for Optuna, what Optuna reads of them, and storages that fail."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from secateur.search.mirror.optuna_copy import OptunaCopy
from secateur.search.mirror.storages import storage_of
from tests.toy import LARGE, SPACE


def copy_of(study, address=None, objectives=("loss", "params")):
    return OptunaCopy(study, SPACE, objectives, LARGE, storage_of(study.directory, address))


@contextmanager
def closing(copy):
    try:
        yield copy
    finally:
        copy.close()
        gc.collect()  # a connection that was forgotten would complain now


def address_of(directory: Path) -> str:
    return f"sqlite:///{directory / 'shared.db'}"


BOTH = pytest.mark.parametrize(
    "address_in", [lambda directory: None, address_of], ids=["journal", "database"]
)


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
