"""Progress of a search: its facts and pace, as lines and on a terminal."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from secateur.search.executor import WorkerStatus
from secateur.search.show.display import SECONDS_BETWEEN_LINES, Display
from secateur.search.show.progress import PACE, Progress
from secateur.search.show.summary import status_line
from tests.runs import REASON, SEARCH, make_settings


def test_the_progress_follows_a_search(made):
    now = [0.0]
    progress = Progress(make_settings(), made.study.about.baselines, clock=lambda: now[0])
    trials = made.trials()
    progress.start(5)
    progress.add(trials[:3])  # the baselines, known from before
    assert progress.pace() == dict.fromkeys(PACE)
    best = progress.facts()["best"]
    assert list(best) == ["0.3", "0.6"]
    assert all(pair["loss"] == pair["reference_loss"] for pair in best.values())
    now[0] = 10.0
    progress.add(trials[3:])
    facts, pace = progress.facts(), progress.pace()
    assert facts["used"] == len(trials) / 30
    assert pace["tokens_per_second"] == (len(trials) - 5) * SEARCH.n_tokens / 10
    assert pace["evaluations_per_hour"] == pytest.approx((len(trials) - 5) * 360)
    assert pace["seconds_left"] == pytest.approx(10 * (30 - len(trials)) / (len(trials) - 5))
    uniform = made.baselines["uniform@0.6"].measurement.values["sparsity"]
    assert facts["best"]["0.6"]["loss"] == min(
        t.measurement.values["loss"]
        for t in trials
        if abs(t.measurement.values["sparsity"] - uniform) <= 0.005
    )
    assert facts["hypervolume"] is not None
    line = status_line({**facts, **pace, "known": 5, "notes": {"made": 7}})
    for part in (
        f"{len(trials)}/30 evaluations (5 from before)",
        "tokens/s",
        "evaluations/h",
        "left",
        "7 made",
    ):
        assert part in line
    assert "25% saved" in line


def test_plain_lines_are_few(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("secateur.search.show.display.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Display(Console(file=stream), make_settings()) as display:
        for step in range(20):
            display.say(f"building levels {step}/20")
        now[0] = SECONDS_BETWEEN_LINES
        display.say("building levels 20/20")
    assert stream.getvalue().splitlines() == ["building levels 0/20", "building levels 20/20"]


def test_a_terminal_shows_the_best_so_far(made):
    stream = io.StringIO()
    staff = WorkerStatus(2, 1, lost=1, troubles=("worker a:1 died",))
    with Display(Console(file=stream, force_terminal=True, width=120), make_settings()) as display:
        display.watch(made.study.about.baselines, SimpleNamespace(worker_status=staff))
        display.on_start(0, make_settings().budget)
        display.on_trials(made.study.trials, made.study.spent)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(rf"1 infeasible +{re.escape(REASON)}", shown)
    assert re.search(r"best at 0.6 +loss [\d.]+ \(trial \d+\); uniform [\d.]+, ratio [\d.]+", shown)
    assert "/30 evaluations" in shown
    assert "evaluations/h" in shown
    assert re.search(r"searching [━╺╸]+ *\d+%", shown)
    assert "1 of 2 workers busy, 1 lost and replaced" in shown
    assert re.search(r"front +\d+ trials, hypervolume", shown)
    assert "worker a:1 died" in shown
