"""Reports of a search to experiment trackers."""

import inspect
import math
import struct
import sys
import threading
from pathlib import Path

import pytest
import yaml

import secateur.search.tracking.trackers as rows
from secateur.search import app
from secateur.search.errors import UsageError
from secateur.search.results.targets import best_by_target, target_sparsities
from secateur.search.settings.settings import identity, resolved, settings_from
from secateur.search.tracking import tracking
from secateur.search.tracking.trackers import TRACKERS, check_trackers
from secateur.search.tracking.tracking import Tracking, flat
from tests.runs import make_run
from tests.test_app import SMALL


class Recorder:
    """A tracker that keeps what it is given; with a word, the method of that name fails."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[str] = []
        self.config: dict = {}
        self.steps: list[tuple[int, dict]] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fails == name:
            raise OSError(f"no answer from https://me:secret@host in {name}\nand more")

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self._call("store")
        self.config = values

    def log(self, values, step=None):
        self._call("log")
        self.steps.append((step, values))

    def finish(self):
        self._call("finish")


@pytest.fixture
def recorders(monkeypatch):
    """Trackers in place of those of accelerate, in the order in which they are opened."""
    made: list[Recorder] = []
    fails = {"in": ""}

    def opened(name, directory):
        made.append(Recorder(fails["in"]))
        made[-1].start()
        return made[-1]

    monkeypatch.setattr(tracking, "open_tracker", opened)
    monkeypatch.setattr(rows, "find_spec", lambda name: True)
    return made, fails


def observed(run, said, **options):
    """A run's search trials, told to a tracker a few at a time."""
    trials = [t for t in run.study.trials if t.measurement.fidelity.part == "search"]
    with Tracking(
        "mlflow", run.study.directory, run.settings, run.study.about.baselines, said.append, **options
    ) as observer:
        for first in range(0, len(trials), 5):
            observer.on_trials(trials[first : first + 5], run.study.spent)
    return trials


# --- settings ---


def test_one_tracker_or_several_each_once():
    assert settings_from({}).trackers == ()
    assert settings_from({"track": "wandb"}).trackers == ("wandb",)
    assert settings_from({"track": ["mlflow", "trackio", "mlflow"]}).trackers == ("mlflow", "trackio")
    for wrong in ("neptune", ["mlflow", "neptune"], 1):
        with pytest.raises(UsageError, match="Expected `track"):
            settings_from({"track": wrong})


def test_trackers_are_no_part_of_a_searchs_identity():
    assert identity(settings_from({"track": "wandb"})) == identity(settings_from({}))
    assert settings_from(resolved(settings_from({"track": ["wandb"]}))).trackers == ("wandb",)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_done(monkeypatch, tmp_path, secateur):
    monkeypatch.setattr(rows, "find_spec", lambda name: None)
    status, _, err = secateur("search", "--run", tmp_path / "run", "-o", "track=wandb")
    assert (status, "pip install 'secateur[track]'" in err) == (2, True)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(rows, "find_spec", lambda name: name == "accelerate" or None)
    with pytest.raises(UsageError, match="Expected wandb for `track: wandb`, got none"):
        check_trackers(["wandb"])
    check_trackers([])


@pytest.mark.parametrize("name", TRACKERS)
def test_rows_fit_the_classes_of_accelerate(name, tmp_path):
    module = pytest.importorskip("accelerate.tracking")
    row = TRACKERS[name]
    of = getattr(module, row.class_name)
    assert of.name == name
    inspect.signature(of).bind(**row.arguments(tmp_path))
    for method in ("start", "store_init_configuration", "log", "finish"):
        assert callable(getattr(of, method))


# --- what is logged ---


def test_each_trial_is_a_step_with_its_objectives_the_best_and_what_was_spent(recorders, tmp_path):
    run, said = make_run(tmp_path / "run", 20), []
    trials = observed(run, said)
    recorder = recorders[0][0]
    assert (said, recorder.calls[:2], recorder.calls[-1]) == ([], ["start", "store"], "finish")
    assert [step for step, _ in recorder.steps] == list(range(len(trials)))
    best: dict[str, float] = {}
    for trial, (_, values) in zip(trials, recorder.steps, strict=True):
        m = trial.measurement
        assert values["trial/number"] == trial.number
        assert values["trial/tokens"] == m.fidelity.n_tokens
        own = {name: x for name, x in values.items() if name.startswith("search")}
        if m.infeasible is not None:
            assert (own, values["trial/infeasible"]) == ({}, 1)
            continue
        where = m.fidelity.text.replace(":", "-")
        names = ("loss", "params", "sparsity")
        assert own == {f"{where}/{name}": m.values[name] for name in names}
        assert all(best[name] >= values[name] for name in best)
        best = {name: x for name, x in values.items() if name.startswith("best/")}
    assert best.keys() == {"best/loss at 0.3", "best/loss at 0.6"}
    last = recorder.steps[-1][1]
    for label, found in best_by_target(run.trials(), target_sparsities(run.baselines)).items():
        assert last[f"best/loss at {label}"] == found.measurement.values["loss"]
    assert last["spent/tokens"] == run.study.spent.tokens
    assert last["spent/evaluations"] == run.study.spent.evaluations
    assert last["front/trials"] == len(run.front())


def test_settings_are_flat_and_without_passwords():
    raw = {"a": {"b": 1, "c": None}, "storage": "postgresql://me:secret@host/db", "d": [0.5, 0.6], "e": True}
    assert flat(raw) == {"a.b": 1, "storage": "postgresql://me:***@host/db", "d": "[0.5, 0.6]", "e": True}


# --- a tracker that fails ---


@pytest.mark.parametrize("step", ["start", "store", "log", "finish"])
def test_a_tracker_that_fails_is_one_message_without_a_password(recorders, tmp_path, step):
    recorders[1]["in"] = step
    run, said = make_run(tmp_path / "run"), []
    observed(run, said)
    [line] = said
    assert line.startswith("the tracker mlflow failed: no answer from https://me:***@host")
    assert "\n" not in line
    assert recorders[0][0].calls[-1] == step  # nothing after it


def test_a_tracker_that_hangs_is_left_behind(recorders, tmp_path, monkeypatch):
    let_go = threading.Event()
    monkeypatch.setattr(Recorder, "log", lambda self, values, step=None: let_go.wait(30))
    said: list[str] = []
    observed(make_run(tmp_path / "run"), said, patience=0.05)
    let_go.set()
    assert said == [
        "the tracker mlflow lacks the last trials, as it does not answer; they are safe in the run"
    ]


def test_greetings_of_trackers_are_no_results(recorders, tmp_path, monkeypatch, capsys):
    let_go = threading.Event()

    def start(self):
        sys.stdout.write("look at me\n")
        assert let_go.wait(30)

    monkeypatch.setattr(Recorder, "start", start)
    monkeypatch.setattr(tracking.Tracking.__init__, "__kwdefaults__", {"patience": 0.05})
    run, said = make_run(tmp_path / "run"), []
    settings = run.settings.model_copy(update={"track": "mlflow"})
    with tracking.tracked(settings, tmp_path, run.study.about.baselines, said.append) as [observer]:
        observer.on_trials(run.study.trials[:2], run.study.spent)
    sys.stdout.write("the result\n")
    let_go.set()
    observer._thread.join()
    out, err = capsys.readouterr()
    assert (out, "look at me" in err) == ("the result\n", True)


# --- in a search ---


def test_a_search_and_its_continuation_log_all_trials_and_a_failing_tracker_does_not_stop_it(
    recorders, tmp_path
):
    made, fails = recorders
    said: list[str] = []
    small = SMALL | {"track": ["mlflow", "wandb"]}
    first = app.run(tmp_path / "run", **small | {"budget": {"evaluations": 4}}, say=said.append)
    assert [len(r.steps) for r in made] == [first.study.spent.evaluations] * 2
    assert made[0].config["budget.evaluations"] == 4
    again = app.run(tmp_path / "run", **small | {"budget": {"evaluations": 6}}, say=said.append)
    assert [len(r.steps) for r in made[2:]] == [again.study.spent.evaluations] * 2
    assert made[2].steps[: len(made[0].steps)] == made[0].steps
    fails["in"] = "log"
    last = app.run(tmp_path / "run", **small | {"budget": {"evaluations": 8}}, say=said.append)
    assert last.study.spent.evaluations == 8
    assert [line.split(":")[0] for line in said if "tracker" in line] == [
        "the tracker mlflow failed",
        "the tracker wandb failed",
    ]


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """Scalars of TensorBoard's event files by name and step, later files over earlier ones."""
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    found: dict[str, dict[int, float]] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = events.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_reads_what_a_search_logs(tmp_path):
    pytest.importorskip("accelerate")
    run = app.run(tmp_path / "run", **SMALL | {"track": "tensorboard", "budget": {"evaluations": 5}})
    found = scalars(tmp_path / "run" / "tensorboard")
    trials = [t for t in run.study.trials if t.measurement.fidelity.part == "search"]
    assert found["trial/number"] == {step: trial.number for step, trial in enumerate(trials)}
    losses = found[f"{run.fidelity.text}/loss".replace(":", "-")]
    compared = {n: t for n, t in enumerate(trials) if t.measurement.fidelity == run.fidelity}
    assert losses == {n: pytest.approx(t.measurement.values["loss"], rel=1e-6) for n, t in compared.items()}
    assert found["spent/tokens"][len(trials) - 1] == run.study.spent.tokens
    [kept] = (tmp_path / "run" / "tensorboard").glob("*/hparams.yml")
    assert yaml.safe_load(kept.read_text())["budget.evaluations"] == 5


def test_mlflow_reads_what_a_search_logs(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    app.run(tmp_path / "run", **SMALL | {"track": "mlflow", "budget": {"evaluations": 5}})
    [run] = mlflow.search_runs(experiment_names=["secateur"], output_format="list")
    assert run.info.run_name == "run"
    assert run.data.metrics["spent/evaluations"] == 5
    assert math.isclose(float(run.data.params["budget.evaluations"]), 5)
