"""Looking at a run: status, once and again and again, and the dashboard."""

from __future__ import annotations

import gc
import io
import json
import re
import socket
import sys
import threading
import urllib.request

import numpy as np
import pytest
from rich.console import Console

from secateur.search.mirror import dashboard
from secateur.search.mirror.storages import storage_of
from secateur.search.results.run import open_run
from secateur.search.show import watch
from secateur.search.show.progress import PACE
from secateur.search.show.summary import status_lines, summary
from secateur.search.study.journal import read_journal
from secateur.search.study.lock import RunLock
from secateur.search.study.study import Study
from secateur.spaces.measurement import Measurement
from tests.runs import REASON, SEARCH, make_run, make_settings, make_space, measure


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def batches():
    """Measurements for a run to grow by."""
    space, rng = make_space(make_settings()), np.random.default_rng(1)
    sampled = {c.text: c for c in (space.sample(rng, i % 2) for i in range(60))}
    measured = [measure(space, candidate, SEARCH) for candidate in sampled.values()]
    measured[5] = Measurement(measured[5].candidate, SEARCH, infeasible="out of memory", n_tokens=1)
    return [measured[i : i + 8] for i in range(0, 40, 8)]


def writing(directory):
    """The run as its driver has it; leave out what is known."""
    study = Study.open(directory)
    return Study.open_or_create(directory, study.settings, study.about)


def append(study, batch):
    return study.append([m for m in batch if study.lookup(m.key) is None])


# --- the facts ---


def test_a_watch_sees_what_a_fresh_look_sees(run):
    make_run(run)
    now = [0.0]
    with writing(run) as study:
        of = watch.Watch(run, clock=lambda: now[0])
        n_first, n_tokens = study.spent.evaluations, study.spent.tokens
        assert of.update()["evaluations_per_hour"] is None
        for batch in batches():
            append(study, batch)
            now[0] += 60
            facts, fresh = of.update(), summary(open_run(run))
            n_new = study.spent.evaluations - n_first
            share = study.spent.evaluations / 30
            pace = {name: facts.pop(name) for name in PACE}
            assert pace["evaluations_per_hour"] == pytest.approx(n_new * 3600 / now[0])
            assert pace["tokens_per_second"] == pytest.approx((study.spent.tokens - n_tokens) / now[0])
            assert pace["seconds_left"] == pytest.approx(now[0] * max(0, 1 - share) / (n_new / 30))
            assert facts.pop("hypervolume") == pytest.approx(fresh.pop("hypervolume"))
            assert facts == fresh
        assert facts["infeasible"] == {REASON: 1, "out of memory": 1}
        assert "process" in facts["writer"]
    assert of.update()["writer"] is None


def test_a_watch_reads_only_what_was_appended(run, monkeypatch):
    make_run(run)
    of, starts, sizes = watch.Watch(run), [], []

    def reader(path, start, known):
        starts.append(start)
        return read_journal(path, start, known)

    with writing(run) as study:
        monkeypatch.setattr("secateur.search.study.study.read_journal", reader)
        for batch in batches():
            sizes.append((run / "measurements.jsonl").stat().st_size)
            append(study, batch)
            of.update()
    assert starts == sizes


def test_the_facts_are_those_of_the_whole_run(run):
    view = make_run(run)
    facts = summary(view)
    assert facts["front"] == len(view.front())
    assert facts["used"] == facts["spent"]["evaluations"] / 30
    for label, best in facts["best"].items():
        uniform = view.baselines[f"uniform@{label}"].measurement.values
        among = [
            t.measurement.values["loss"]
            for t in view.trials()
            if abs(t.measurement.values["sparsity"] - uniform["sparsity"]) <= 0.005
        ]
        assert best["loss"] == min(among)
        assert (best["reference"], best["reference_loss"]) == ("uniform", uniform["loss"])
    lines = status_lines(facts)
    assert "used)" in lines["budget"]
    assert "25%" in lines["blocks"]
    assert lines["1 infeasible"] == REASON


def test_half_a_line_is_read_when_it_is_whole(run):
    make_run(run)
    of = watch.Watch(run)
    before = of.update()["spent"]["evaluations"]
    line = json.dumps(batches()[0][0].to_json()) + "\n"
    path = run / "measurements.jsonl"
    whole = path.read_bytes()
    for end, n in ((10, 0), (len(line) - 1, 0), (len(line), 1)):
        path.write_bytes(whole + line[:end].encode())
        assert of.update()["spent"]["evaluations"] == before + n


def test_a_run_that_is_continued_with_other_settings_is_opened_again(run):
    make_run(run)
    of = watch.Watch(run)
    settings = Study.open(run).settings | {"budget": {"evaluations": 12345}, "objectives": ["loss"]}
    with Study.open_or_create(run, settings, Study.open(run).about) as study:
        append(study, batches()[0])
        facts = of.update()
    assert facts["budget"] == {"evaluations": 12345}
    assert of.update() == summary(open_run(run)) | dict.fromkeys(PACE)


# --- the command ---


@pytest.fixture
def live(run, monkeypatch):
    """A run whose driver adds a batch between two looks, and then goes."""
    make_run(run)
    study, waiting = writing(run), batches()

    def sleep(seconds):
        if waiting:
            append(study, waiting.pop(0))
        else:
            study.close()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    yield run
    study.close()


def test_watching_prints_lines_until_the_driver_has_gone(secateur, live):
    status, out, err = secateur("status", live, "--watch", "--every", "0.1")
    lines = out.splitlines()
    assert status == 0
    assert len(lines) == 1 + len(batches())  # no line without news
    assert all(
        re.search(r"[\d,]+/30 evaluations, .*\d+% of .* front of \d+, hypervolume", line) for line in lines
    )
    assert "evaluations/h" in lines[-1]
    assert lines[-1].endswith(f"infeasible: 1 {REASON!r}, 1 'out of memory'")
    assert "uniform" in lines[-1]
    assert err == f"secateur: note: Nobody is writing {live} any more.\n"


def test_watching_as_json_is_a_line_an_update(secateur, live):
    status, out, err = secateur("status", live, "--watch", "--json")
    documents = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert len(documents) == 2 + len(batches())
    assert documents[0]["writer"]
    assert documents[-1]["writer"] is None
    assert documents[-1]["evaluations_per_hour"] > 0


def test_a_terminal_is_painted_again_and_again(live):
    stream = io.StringIO()
    watch.watch_here(live, Console(file=stream, force_terminal=True, width=150), every=0.1)
    shown = stream.getvalue()
    assert "written by process" in shown
    assert "no process is writing it" in shown
    assert "evaluations/h" in shown


def test_ctrl_c_ends_watching_without_an_error(secateur, live, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    status, out, err = secateur("status", live, "--watch")
    assert (status, len(out.splitlines())) == (0, 1)
    assert err.startswith("secateur: note: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [(["{run}", "--watch", "--every", "0"], "--every"), (["{run}/nowhere", "--watch"], "study.json")],
)
def test_watching_wrongly_is_status_2(secateur, run, words, said):
    make_run(run)
    status, out, err = secateur("status", *(word.format(run=run) for word in words))
    assert (status, out) == (2, "")
    assert said in err


# --- the dashboard ---


def open_dashboard(run, monkeypatch):
    """Serve a run in a thread; its address, and what ends it."""
    ready, found, servers = threading.Event(), [], []

    class Server(dashboard._Server):
        def __init__(self, *args):
            super().__init__(*args)
            servers.append(self)

    monkeypatch.setattr(dashboard, "_Server", Server)
    thread = threading.Thread(
        target=dashboard.serve_dashboard,
        args=(open_run(run), "127.0.0.1", 0, lambda address: (found.append(address), ready.set())),
    )
    thread.start()
    assert ready.wait(60)

    def end():
        servers[0].shutdown()
        thread.join()
        gc.collect()

    return found[0], end


@pytest.mark.parametrize("kind", ["journal", "database"])
@pytest.mark.parametrize("driver", [False, True])
def test_the_dashboard_shows_the_mirror_and_catches_up_first(run, tmp_path, monkeypatch, kind, driver):
    pytest.importorskip("optuna_dashboard")
    storage = None if kind == "journal" else f"sqlite:///{tmp_path / 'mirror.db'}"
    view = make_run(run, storage=storage)
    address, end = open_dashboard(run, monkeypatch)  # makes the mirror
    if driver:
        end()
        lock = RunLock(run)  # from now on the mirror is the driver's
        address, end = open_dashboard(run, monkeypatch)
        lock.close()
    try:
        base, _, number = address.partition("/dashboard/studies/")
        with urllib.request.urlopen(f"{base}/api/studies/{number}") as answer:
            document = json.load(answer)
    finally:
        end()
    assert len(document["trials"]) == len([t for t in view.study.trials if t.measurement.fidelity == SEARCH])
    assert document["name"].startswith("secateur" if kind == "journal" else "run-")


def test_the_dashboard_says_what_is_wrong(secateur, run, monkeypatch):
    pytest.importorskip("optuna_dashboard")
    make_run(run)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        status, _, err = secateur("dashboard", run, "--port", busy.getsockname()[1])
    assert (status, "--port" in err, "in use" in err) == (2, True, True)
    lock = RunLock(run)
    storage_of(run, None).renew()
    status, _, err = secateur("dashboard", run)
    assert (status, "none yet" in err) == (2, True)
    lock.close()
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    status, _, err = secateur("dashboard", run)
    assert (status, "secateur[dashboard]" in err) == (2, True)


def test_a_dashboard_of_a_database_that_is_away_is_status_2(secateur, run, tmp_path):
    pytest.importorskip("optuna_dashboard")
    make_run(run, storage=f"sqlite:///{tmp_path / 'gone' / 'mirror.db'}")
    status, _, err = secateur("dashboard", run)
    assert (status, "that answers" in err) == (2, True)


# --- secrets ---


def test_no_password_is_shown(secateur, run, monkeypatch):
    make_run(run, storage="postgresql+psycopg://me:geheim@127.0.0.1:9/db")
    shown = [
        *secateur("status", run)[1:],
        *secateur("status", run, "--json")[1:],
        *secateur("report", run)[1:],
    ]
    page = (run / "report" / "index.html").read_text()
    assert "me:***@127.0.0.1" in page
    assert "geheim" not in "".join([*shown, page])
    monkeypatch.setattr(
        "secateur.search.app.search", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    status, _, err = secateur("search", "--run", run, "-o", "storage=postgresql://me:geheim@h/db")
    assert status == 130
    assert "me:***@h/db" in err
    assert "geheim" not in err
