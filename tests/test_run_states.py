"""States, log, lock and exit statuses of a run: what it is doing, and why it ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time

import pytest

from secateur.search import app
from secateur.search.app import searching
from secateur.search.cli import _dispatch
from secateur.search.errors import STATUSES, BusyError, UnavailableError, UsageError
from secateur.search.files import StudyWriteError
from secateur.search.loop.driven import DrivenRun
from secateur.search.mirror.address import check_storage
from secateur.search.mirror.storages import storage_of
from secateur.search.results.run import open_run
from secateur.search.settings.settings import identity, settings_from
from secateur.search.show.summary import status_lines, summary
from secateur.search.show.watch import watch
from secateur.search.study.lock import RunLock
from secateur.search.study.state import GONE, LOG, STATE, RunState, read_state, write_state
from tests.mirrors import Outage, mirrored
from tests.runs import make_run
from tests.test_app import SMALL

RAW = {
    "space": {"metric": "magnitude", "target": 0.5},
    "controller": {"kind": "uniform"},
    "evaluator": {"window": 64, "calibration_tokens": 64, "fidelities": [128], "test_tokens": 128},
    "budget": {"evaluations": 9},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("states") / "deep" / "run"
    seen: list[str] = []

    def say(line):
        state = read_state(directory)
        seen.append(state.state if state else "none")

    app.search(settings_from(RAW), directory, say=say)
    return directory, seen


def test_a_run_is_prepared_then_running_then_finished_with_the_reason(finished):
    directory, seen = finished
    assert {"preparing", "running"} <= set(seen)
    assert seen.index("preparing") < seen.index("running")
    state = read_state(directory)
    assert state.state == "finished"
    assert (
        state.reason
        == "the controller has finished: every baseline is measured, and it proposes nothing else"
    )
    facts = summary(open_run(directory))
    assert facts["state"]["state"] == "finished"
    assert status_lines(facts)["state"].startswith("finished: the controller has finished: every baseline")


def test_the_log_has_the_stages(finished):
    lines = (finished[0] / LOG).read_text().splitlines()
    assert all(line[:4].isdigit() and "+00:00 " in line for line in lines)
    text = "\n".join(lines)
    for part in ("started", "loading tiny", "searching, 0 measurements known", "finished: the controller"):
        assert part in text


def test_status_tells_the_state(finished, secateur):
    status, out, _ = secateur("status", finished[0], "--json")
    assert status == 0
    assert json.loads(out)["state"]["state"] == "finished"


def test_another_search_is_refused_before_the_model_is_loaded(finished):
    said: list[str] = []
    other = settings_from({**RAW, "space": {"metric": "wanda", "target": 0.5}})
    with pytest.raises(UsageError, match=r"space\.metric: magnitude -> wanda"):
        app.search(other, finished[0], say=said.append)
    assert not [line for line in said if line.startswith("loading")]
    assert read_state(finished[0]).state == "finished"


def test_a_run_that_is_written_is_busy_before_the_model_is_loaded(finished, secateur):
    said: list[str] = []
    lock = RunLock(finished[0])
    try:
        with pytest.raises(BusyError, match=f"process {os.getpid()}"):
            app.search(settings_from(RAW), finished[0], say=said.append)
    finally:
        lock.close()
    assert not [line for line in said if line.startswith("loading")]


def test_a_refused_search_leaves_no_trace(tmp_path):
    with pytest.raises(UsageError, match="model"):
        app.search(settings_from({**RAW, "model": "./nowhere"}), tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_kept_with_its_reason(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RuntimeError), DrivenRun(run, {}):
        raise RuntimeError("out of \x1b[31mmemory\x1b[0m")
    state = read_state(run)
    assert (state.state, state.reason) == ("failed", "out of memory")
    assert "failed: out of memory" in (run / LOG).read_text()
    DrivenRun(run, {}).lock.close()  # and the run may begin again


def test_an_interrupt_while_preparing_leaves_no_trace(tmp_path):
    with pytest.raises(KeyboardInterrupt), DrivenRun(tmp_path / "run", identity(settings_from(RAW))):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_is_gone_has_failed(tmp_path):
    make_run(tmp_path / "run")
    write_state(tmp_path / "run", "running")
    state = read_state(tmp_path / "run")
    assert (state.state, state.reason) == ("failed", GONE)
    lock = RunLock(tmp_path / "run")
    assert read_state(tmp_path / "run").state == "running"
    lock.close()
    (tmp_path / "run" / STATE).write_text("{}")
    assert read_state(tmp_path / "run") is None


def test_a_watch_waits_for_a_run_that_is_prepared(tmp_path):
    run = tmp_path / "run"
    waited: list[str] = []
    shown: list[dict] = []
    (tmp_path / "other").mkdir()
    with DrivenRun(run, {}) as driven:
        driven.telling(lambda line: None)("loading a large model")
        made = make_run(tmp_path / "made")

        def move(directory):
            waited.append(str(directory))
            for path in made.study.directory.iterdir():
                if path.name != "run.lock":
                    path.rename(run / path.name)
            driven.lock.close()
            write_state(run, "finished", "for the test")

        watch(run, shown.append, 0.01, move)
    assert waited == [str(run)]
    assert shown[-1]["state"]["reason"] == "for the test"


def test_status_of_a_run_that_is_prepared(tmp_path, secateur):
    with DrivenRun(tmp_path / "run", {}) as driven:
        driven.telling(lambda line: None)("loading a large model")
        status, out, _ = secateur("status", tmp_path / "run")
        assert (status, "preparing: loading a large model" in out) == (0, True)
        status, out, _ = secateur("status", tmp_path / "run", "--json")
        assert json.loads(out)["state"]["state"] == "preparing"


# --- exit statuses ---


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("Expected"), 2),
        (BusyError("Expected"), 4),
        (UnavailableError("Expected"), 5),
        (StudyWriteError("Expected"), 6),
        (RuntimeError("x"), 1),
    ],
)
def test_each_kind_of_error_has_its_status(monkeypatch, secateur, error, status):
    def fail(*_):
        raise error

    monkeypatch.setattr("secateur.search.results.run.open_run", fail)
    assert secateur("front", "anything")[0] == status
    assert status in STATUSES


def test_the_help_documents_the_statuses(secateur):
    out = " ".join(secateur("--help")[1].split())
    for number, words in STATUSES.items():
        assert f"{number} {words}" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_search_that_is_stopped_ends_with_status_3(tmp_path, number):
    arguments = [
        "search",
        "--run",
        str(tmp_path / "run"),
        "-o",
        "budget.evaluations=100000",
        "-o",
        "space.target=0.5",
    ]
    arguments += ["-o", "evaluator={window: 64, calibration_tokens: 64, fidelities: [128], test_tokens: 128}"]
    arguments += ["-o", "space.metric=magnitude", "-o", "controller.kind=random"]
    done = threading.Event()

    def stop():
        while not done.is_set():
            state = read_state(tmp_path / "run")
            if state is not None and state.state == "running":
                os.kill(os.getpid(), number)
                return
            time.sleep(0.05)

    threading.Thread(target=stop, daemon=True).start()
    import typer

    with pytest.raises(typer.Exit) as ending:
        _dispatch(arguments)
    done.set()
    assert ending.value.exit_code == 3
    assert read_state(tmp_path / "run") == RunState("stopped", "stopped", read_state(tmp_path / "run").since)


# --- a database that is down ---


@pytest.fixture
def closed_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_search_begins_while_its_database_is_down(closed_port):
    pytest.importorskip("psycopg")
    (line,) = check_storage(f"postgresql://me@127.0.0.1:{closed_port}/db")
    assert line.endswith("does not answer; the search begins, and the mirror waits")
    assert check_storage(None) == []


@pytest.mark.parametrize("comes_back", [True, False], ids=["within the search", "before the next start"])
def test_the_mirror_catches_up_with_a_search_that_began_without_its_database(
    tmp_path, closed_port, monkeypatch, comes_back
):
    """The address is of nobody; what stands for its database refuses once, or as long as the first search lasts."""
    pytest.importorskip("psycopg")
    there = f"sqlite:///{tmp_path / 'mirror.db'}"
    small = SMALL | {"storage": f"postgresql://me@127.0.0.1:{closed_port}/db", "budget": {"evaluations": 6}}
    said: list[str] = []

    def search(n_refused):
        monkeypatch.setattr(
            searching, "storage_of", lambda run, address: Outage(storage_of(run, there), n_refused)
        )
        return app.run(tmp_path / "run", **small, say=said.append)

    run = search(1 if comes_back else None)
    assert run.study.spent.evaluations == 6
    assert "does not answer; the search begins, and the mirror waits" in said[0]
    ours = [t.number for t in run.study.trials if t.measurement.fidelity == run.fidelity]
    about = [line for line in said if line.startswith(f"the mirror {there}")]
    assert "lags: the database has gone away" in about[0]
    if comes_back:
        assert about[1:] == [f"the mirror {there} has caught up"]
    else:
        assert f"lacks {len(ours)} trials" in about[1]
        search(0)
    assert [copy.user_attrs["number"] for copy in mirrored(tmp_path / "run", there)] == ours


def test_a_host_without_an_address_is_unavailable():
    pytest.importorskip("psycopg")
    with pytest.raises(UnavailableError, match="a `storage` that answers"):
        check_storage("postgresql://me@no-such-host.invalid/db")
