"""The command: what it prints where, and how it ends."""

import errno
import io
import json
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console

import secateur.search.app as rooms
from secateur.search.budget import Spent
from secateur.search.cli import COMMANDS, _app
from secateur.search.cli.doctor import examine
from secateur.search.cli.lists import LISTS
from secateur.search.executor import WorkerStatus
from secateur.search.loop.interrupt import Interrupt
from secateur.search.loop.loop import Outcome
from secateur.search.show import console
from secateur.search.show.display import SECONDS_BETWEEN_LINES, Display
from secateur.search.show.progress import PACE, Progress
from secateur.search.show.summary import status_line
from tests.runs import REASON, SEARCH, make_run, make_settings

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run")


def is_one_line(err):
    return re.fullmatch(r"secateur: error: [^\n]+\n", err) is not None


# --- help ---


def test_the_version_is_that_of_the_package(secateur):
    assert secateur("--version") == (0, f"secateur {metadata.version('secateur')}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_every_option_has_a_help_text(secateur, command):
    status, out, _ = secateur(command, "--help")
    assert status == 0
    context = typer.Context(typer.main.get_command(_app()).commands[command])
    records = [p.get_help_record(context) for p in context.command.params if p.name != "help"]
    assert context.command.help
    assert all(record is not None and record[1] for record in records)
    assert out.startswith(f"Usage: secateur {command}")


# --- reading a run ---


def test_front_shows_a_table_and_draws_a_picture(secateur, made):
    status, out, err = secateur("front", made.study.directory)
    assert (status, err) == (0, "")
    for trial in made.front():
        assert f" {trial.number} " in out
    assert "uniform@0.6" in out
    assert "no smaller, no faster" in out
    assert (made.study.directory / "report" / "front.png").read_bytes().startswith(PNG)


def test_front_as_json_is_exact(secateur, made):
    status, out, err = secateur("front", made.study.directory, "--json")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert [row["trial"] for row in document["front"]] == [trial.number for trial in made.front()]
    assert document["front"][0]["values"] == dict(made.front()[0].measurement.values)
    assert document["objectives"]["loss"] == {"unit": "nats/token", "direction": "minimize"}


def test_front_of_a_run_that_cannot_be_written_is_still_shown(secateur, tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "run" / "report").write_text("in the way")
    status, out, err = secateur("front", run.study.directory, "--json")
    assert (status, len(json.loads(out)["front"])) == (0, len(run.front()))
    assert err.startswith("secateur: warning: ")


def test_pick_gives_the_best_within_the_bounds(secateur, made):
    status, out, _ = secateur(
        "pick", made.study.directory, "--sparsity", "0.6", "--max-params", "0.9x", "--json"
    )
    document = json.loads(out)
    assert status == 0
    within = [t for t in made.trials() if t.measurement.values["sparsity"] >= 0.595]
    assert document["values"]["loss"] == min(t.measurement.values["loss"] for t in within)
    assert len(document["sparsity_of"]) == 6
    status, out, _ = secateur("pick", made.study.directory, "--sparsity", "0.6")
    assert (status, out.split()[1]) == (0, f"{document['trial']}:")


def test_status_and_report_as_json(secateur, made):
    assert json.loads(secateur("status", made.study.directory, "--json")[1])["front"] == len(made.front())
    files = json.loads(secateur("report", made.study.directory, "--sparsity", "0.3", "--json")[1])["files"]
    assert all(Path(file).is_file() for file in files)


@pytest.mark.parametrize("what", LISTS)
def test_everything_can_be_listed(secateur, what):
    status, out, _ = secateur("list", what, "--json")
    rows = json.loads(out)
    assert status == 0
    assert rows
    assert all(set(row) >= {"name", "summary", "source"} and row["summary"] for row in rows)
    assert rows[0]["name"] in secateur("list", what)[1]


def test_reading_a_run_does_not_load_torch(made):
    code = (
        "import sys\nfrom secateur.search.cli import main\nrun = sys.argv[1]\n"
        "for words in (['--help'], ['front', run], ['status', run], ['report', run]):\n"
        "    sys.argv = ['secateur', *words]\n"
        "    try:\n        main()\n"
        "    except SystemExit as ending:\n        assert not ending.code, ending.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(made.study.directory)], check=True, stdout=subprocess.DEVNULL
    )


def test_a_reader_that_goes_away_is_no_error(made):
    code = "from secateur.search.cli import main; main()"
    command = [sys.executable, "-c", code, "front", str(made.study.directory), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# --- wrong use and failures ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fronts", "{run}"], "front"),
        (["front"], "RUN"),
        (["front", "{run}", "--jsn"], "--json"),
        (["front", "{nowhere}"], "study.json"),
        (["pick", "{run}"], "max-params"),
        (["pick", "{run}", "--max-params", "few"], "90M"),
        (["pick", "{run}", "--sparsity", "0.99"], "nearest is trial"),
        (["report", "{run}", "3", "--sparsity", "0.3"], "both"),
        (["report", "{run}", "999"], "999"),
        (["export", "{run}", "3", "--to", "{nowhere}", "--calibration", "some"], "sequential"),
        (["list", "metric"], "metrics"),
        (["search", "{nowhere}.yaml"], "nowhere.yaml"),
        (["search", "--run", "{nowhere}", "-o", "budgt.tokens=1"], "budget"),
        (["search", "--run", "{nowhere}", "-o", "space.target=1.5"], "[0, 1]"),
        (["search", "--run", "{nowhere}", "-o", "seed"], "budget.evaluations=600"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(secateur, made, tmp_path, words, said):
    nowhere = tmp_path / "nowhere"
    before = (made.study.directory / "measurements.jsonl").read_bytes()
    status, out, err = secateur(*(w.format(run=made.study.directory, nowhere=nowhere) for w in words))
    assert (status, out) == (2, "")
    assert is_one_line(err)
    assert said in err
    assert not nowhere.exists()
    assert (made.study.directory / "measurements.jsonl").read_bytes() == before


class RoomError(ValueError):
    """As other rooms have them."""

    __module__ = "secateur.evaluators.data.sources"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RoomError("A text\nthat is too short."), 2),
        (ValueError("Expected `levels` to ascend, got [1, 0]."), 2),
        (ValueError("math domain error"), 1),
        (OSError(errno.ENOSPC, "No space left on device", "levels/0.bin"), 6),
        (OSError(errno.EACCES, "Permission denied", "levels/0.bin"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_is_one_line_with_its_status(secateur, made, monkeypatch, tmp_path, error, status):
    def fail(directory):
        raise error

    monkeypatch.setattr("secateur.search.results.run.open_run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    got, out, err = secateur("front", made.study.directory)
    assert (got, out) == (status, "")
    assert is_one_line(err)


def test_the_traceback_of_a_bug_is_kept(secateur, made, monkeypatch, tmp_path):
    def fail(directory):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("secateur.search.results.run.open_run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, _, err = secateur("front", made.study.directory)
    (kept,) = tmp_path.glob("*.traceback")
    assert str(kept) in err
    assert "in fail" in kept.read_text()
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    assert console.run_command(lambda: fail(None)) == 1


def test_memory_that_is_refused_is_no_bug(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for command in (lambda: torch.zeros(1 << 57), lambda: [0] * (1 << 57)):
        assert console.run_command(command) == 1
        err = capsys.readouterr().err
        assert is_one_line(err)
        assert "error: Expected enough memory, got: " in err
        assert "bug" not in err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_seen_behind_another_error(capsys):
    def fail():
        raise RuntimeError("Expected to write the model.") from OSError(
            errno.ENOSPC, "No space left on device"
        )

    assert console.run_command(fail) == 6
    assert is_one_line(capsys.readouterr().err)


# --- search, with the room's functions replaced ---


def test_search_ends_with_the_front_and_what_to_do_next(secateur, monkeypatch, tmp_path):
    seen = {}

    def search(settings, directory, *, observers, say, note, on_ready, forecast):
        assert forecast(note).subject["model"] == "tiny"
        note("seed 0 decides: proposals")
        say("loading tiny")
        run = make_run(directory)
        on_ready(
            SimpleNamespace(baselines=run.study.about.baselines, notes={}),
            SimpleNamespace(worker_status=WorkerStatus(1, 0)),
        )
        for observer in observers:
            observer.on_start(0, settings.budget)
            observer.on_trials(run.trials(), run.study.spent)
            observer.on_end(Outcome("budget", run.study.spent))
        seen.update(settings=settings, spent=run.study.spent)
        return Outcome("budget", run.study.spent)

    monkeypatch.setattr(rooms, "search", search)
    words = ["search", "--run", tmp_path / "run", "-o", "budget.evaluations=7"]
    status, out, err = secateur(*words)
    assert status == 0
    assert seen["settings"].budget.evaluations == 7
    assert f"secateur export {tmp_path / 'run'} --sparsity 0.6" in out
    assert err.startswith("forecast: memory ")
    assert "\nseed 0 decides: proposals" in err
    assert "loading tiny" in err
    assert "search ended (its budget is used up)" in err
    (tmp_path / "run" / "measurements.jsonl").rename(tmp_path / "gone")
    status, out, _ = secateur(*words, "--json")
    document = json.loads(out)
    assert (status, document["ended"]) == (0, "budget")
    assert document["spent"]["tokens"] == seen["spent"].tokens


class FakeSearch:
    stopped = False

    def stop(self):
        self.stopped = True


def test_the_first_signal_stops_and_the_second_interrupts():
    said, search = [], FakeSearch()
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(said.append, "secateur search s.yaml") as interrupt:
        interrupt.watch(search)
        signal.raise_signal(signal.SIGINT)
        assert search.stopped
        assert "secateur search s.yaml" in said[0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_before_or_after_a_search_interrupts():
    search = FakeSearch()
    with Interrupt([].append, "") as interrupt:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupt.watch(search)
        interrupt.on_end(Outcome("budget", Spent()))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert not search.stopped


# --- progress ---


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


def test_plain_lines_are_few(made, monkeypatch):
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


# --- doctor ---


def test_doctor_finds_what_is_broken(tmp_path):
    def damaged():
        raise ValueError("Expected a whole file, got half of one.")

    checks = {
        check.name: check for check in examine(tmp_path / "new" / "cache", lambda: "2 threads", damaged)
    }
    assert checks["model tiny"].ok is False
    assert checks["torch sees"].found == "2 threads"
    assert all(checks[name].ok for name in ("secateur", "torch", "optuna", "pyyaml", "typer"))
    assert checks["cache"].ok is True
    assert not (tmp_path / "new").exists()


def test_doctor_finds_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**where):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    checks = {check.name: check for check in examine(tmp_path, str, str)}
    assert checks["cache"].ok is False
    assert "SECATEUR_CACHE" in checks["cache"].found
