"""The command: its help, its answers about a run, and the end of a search."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import secateur.search.app as rooms
from secateur.search.cli import COMMANDS, _app
from secateur.search.cli.lists import LISTS
from secateur.search.executor import WorkerStatus
from secateur.search.loop.loop import Outcome
from tests.runs import make_run

PNG = b"\x89PNG\r\n\x1a\n"


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
