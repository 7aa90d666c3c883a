"""A search in lines of text."""

from types import SimpleNamespace

from secateur.search.budget import Spent
from secateur.search.controller import Trial
from secateur.search.executor import WorkerStatus
from secateur.search.loop.loop import Outcome
from secateur.search.show.lines import Lines
from secateur.search.show.summary import summary
from secateur.search.show.values import spread
from secateur.spaces.measurement import Fidelity, Measurement
from tests.runs import make_run


def test_a_search_is_a_line_a_round(tmp_path):
    run, lines, seconds = make_run(tmp_path / "run"), [], [5.0]
    shown = Lines("arm-0", run.settings, write=lines.append, clock=lambda: seconds[0])
    shown.say("loading tiny")
    shown.on_ready(
        SimpleNamespace(baselines=run.study.about.baselines),
        SimpleNamespace(worker_status=WorkerStatus(1, 0)),
    )
    shown.on_start(2, run.settings.budget)
    seconds[0] = 47.0
    trials = run.trials()
    shown.on_trials(trials, Spent().plus(trials))
    shown.on_end(Outcome("budget", Spent()))
    begun, known, told, ended = lines
    assert (begun, known) == ("arm-0: loading tiny", "arm-0: 2 measurements known")
    best = summary(run)["best"]["0.6"]["loss"]
    assert told.startswith(f"arm-0: {len(trials)}/30 evaluations (2 from before), ")
    assert f", {best:.4f} at 0.6" in told
    assert told.endswith("; 42 CPU s")
    assert ended.startswith("arm-0: ended (its budget is used up): ")


def test_a_round_of_screening_is_no_line_of_its_own(tmp_path):
    run, lines = make_run(tmp_path / "run"), []
    shown = Lines("seed-0", run.settings, write=lines.append)
    proxies = [
        Trial(100 + i, Measurement(f"formula-{i}", Fidelity("proxy", 64), {"loss": 1.0})) for i in range(3)
    ]
    shown.on_trials(proxies, Spent())
    assert lines == []
    shown.on_trials([*run.trials(), *proxies], Spent())
    assert "; 6 screened; " in lines[0]


def test_a_spread_is_the_median_and_the_range():
    assert spread([3.0, 1.0, 2.5]) == "2.5 (1 to 3)"
    assert spread([0.12345], ".3f") == "0.123"
    assert spread([]) == "–"
