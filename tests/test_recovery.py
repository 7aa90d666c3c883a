"""The recovery stage: what it keeps, what it refuses, and one recovery of the embedded model on a real Ray."""

import json
import math
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.recovery import tuning
from secateur.search.recovery.stage import Stage, recovery_settings
from secateur.search.recovery.tuning import Trained, train_all
from secateur.search.results.run import Run
from secateur.search.show.front_table import as_table, front_json, front_rows
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement
from tests.runs import SEARCH, make_run

RECIPE = {"method": "full", "lr": 1e-3, "tokens": 4096, "seed": 3}


MEASURED = {"test:1024, as recovered": {"kl": 0.5, "ce": 3.5}}


def trained(numbers, **changes):
    whole = {"state": Path("state"), "trained_tokens": 4096, "course": (), "seconds": 2.0, "reason": None}
    return {number: Trained(**{**whole, **changes}) for number in numbers}


def finish(number, state, to):
    to.mkdir()
    return MEASURED, {"loss": 0.5, "kl": 0.5, "ce": 3.5, "trained_tokens": 4096.0}


def stage(study, numbers=(1, 2), recipe=RECIPE):
    return Stage(study, [study.trials[number] for number in numbers], recipe, 1024)


@pytest.fixture
def study(tmp_path):
    run = make_run(tmp_path / "run")
    with Study.open_or_create(tmp_path / "run", run.study.settings, run.study.about) as study:
        yield study


def test_results_join_the_study_at_their_own_fidelity(study):
    view = Run(study)
    front, spent = [t.number for t in view.front()], study.spent
    picked = view.front()[1]
    n_before = len(study.trials)
    (result,) = stage(study, [picked.number]).run(trained, finish)
    m = study.trials[n_before].measurement
    assert result.measurement == m
    assert (m.candidate, m.fidelity.text) == (picked.measurement.candidate, "recovered:4096")
    assert (m.values["loss"], m.n_tokens, m.seconds, m.seed) == (0.5, 1024, 2.0, 3)
    record = json.loads((result.directory / "recovery.json").read_text())
    assert record["recipe"] == RECIPE
    assert record["trial"] == picked.number
    # Nothing that compares takes it for a searched trial.
    view = Run(Study.open(study.directory))
    assert [t.number for t in view.front()] == front
    assert view.study.spent == spent
    assert view.test_of(picked).values["loss"] != 0.5
    assert view.recovered_of(picked) == m


def test_the_front_shows_it_beside_the_searched_trial(study):
    view = Run(study)
    picked = view.front()[1]
    headings = [" ".join(str(column.header).split()) for column in as_table(view, front_rows(view)).columns]
    assert "test loss, recovered" not in headings
    stage(study, [picked.number]).run(trained, finish)
    rows = front_rows(view)
    table = as_table(view, rows)
    (column,) = [c for c in table.columns if str(c.header).split() == ["test", "loss,", "recovered"]]
    assert [str(cell) for cell in column.cells].count("0.5000") == 1
    (found,) = [row for row in front_json(view, rows)["front"] if row["recovered"]]
    assert found["trial"] == picked.number
    assert found["recovered"]["trained_tokens"] == 4096


def test_it_is_no_trial_to_export(study):
    stage(study).run(trained, finish)
    with pytest.raises(UsageError, match=r"recovered model. Use the one in recovered/"):
        Run(study).pick(number=len(study.trials) - 1)


def test_what_is_there_is_not_trained_again(study):
    first = stage(study).run(trained, finish)
    n_trials = len(study.trials)
    asked = []

    def train(numbers):
        asked.append(list(numbers))
        return trained(numbers)

    again = stage(study, (1, 2, 3)).run(train, finish)
    assert asked == [[3]]
    assert len(study.trials) == n_trials + 1
    assert [r.measurement for r in again[:2]] == [r.measurement for r in first]
    assert [r.note for r in again] == ["was there already"] * 2 + [""]


def test_another_recipe_with_as_many_tokens_is_refused_before_any_training(study):
    stage(study).run(trained, finish)
    with pytest.raises(
        UsageError, match=r"trial 1 was recovered with at 4,096 tokens \(lr 0.001\), got another"
    ):
        stage(study, recipe={**RECIPE, "lr": 1e-2})
    other = stage(study, recipe={**RECIPE, "tokens": 8192}).run(trained, finish)  # another fidelity
    assert [r.measurement.fidelity.text for r in other] == ["recovered:8192"] * 2
    assert Run(study).recovered_of(study.trials[1]).fidelity.n_tokens == 8192


def test_what_stopped_early_is_no_result_and_can_be_tried_again(study):
    n_trials = len(study.trials)
    experiment = stage(study).experiment
    experiment.mkdir(parents=True)
    results = stage(study).run(lambda n: trained(n[:1]) | trained(n[1:], reason="stopped early"), finish)
    assert [r.note for r in results] == ["", "stopped early"]
    assert results[1].directory is None
    assert len(study.trials) == n_trials + 1
    assert experiment.is_dir()  # the reason is in there
    stage(study).run(trained, finish)
    assert not experiment.exists()  # checkpoints are large


def test_a_stage_that_was_killed_before_the_measurement_goes_on(study):
    def killed(number, state, to):
        finish(number, state, to)
        raise KeyboardInterrupt

    def finish_again(number, state, to):
        assert to.is_dir()
        return MEASURED, {"loss": 0.5}

    with pytest.raises(KeyboardInterrupt):
        stage(study, [1]).run(trained, killed)
    (result,) = stage(study, [1]).run(trained, finish_again)
    assert result.measurement is not None


def test_experiments_of_other_trials_or_recipes_are_apart(study):
    directories = {
        stage(study, numbers, {**RECIPE, **changes}).experiment
        for numbers in ((1, 2), (2, 1), (1,))
        for changes in ({}, {"seed": 4})
    }
    assert len(directories) == 4
    assert all(directory.is_absolute() for directory in directories)


def test_trials_of_one_candidate_count_once_as_the_one_that_the_front_shows(study):
    view = Run(study)
    (first,) = [t for t in view.front() if t.number == view.front()[0].number]
    test = next(
        t
        for t in study.trials
        if t.measurement.candidate == first.measurement.candidate and t.measurement.fidelity.part == "test"
    )
    assert view.as_searched([test, first]) == [first]
    only_small = Trial(99, Measurement("other", Fidelity("search", 1024), {"loss": 1.0}))
    assert view.as_searched([only_small]) == [only_small]
    assert view.fidelity == SEARCH


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"method": "adapters"}, "`method`"),
        ({"tokens": 0}, "`tokens`"),
        ({"lr": float("inf")}, "`lr`"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_settings_are_read_strictly(raw, message):
    with pytest.raises(UsageError, match=message):
        recovery_settings(**raw)


# --- on Ray ---


def make_tiny_run(directory):
    """A study of the embedded model with its baselines, as a search begins."""
    from secateur.search import app
    from secateur.search.settings.settings import identity, resolved, settings_from
    from secateur.search.study.about import About

    settings = settings_from(
        {
            "model": "tiny",
            "space": {"target": [0.6, 0.7], "statistics": "dense"},
            "evaluator": {
                "window": 128,
                "fidelities": [512],
                "test_tokens": 1024,
                "calibration_tokens": 2048,
            },
        }
    )
    session = app.open_session(settings)
    shape = {"linears": [asdict(linear) for linear in session.prunables], **asdict(session.dense.shape)}
    about = About(
        identity=identity(settings) | {"content": session.facts()},
        baselines={name: candidate.text for name, candidate in session.space.baselines().items()},
        facts={"shape": shape},
    )
    with Study.open_or_create(directory, resolved(settings), about) as study:
        session.build_levels(directory / "levels")
        evaluator = session.evaluator(directory / "levels")
        texts = list(about.baselines.values())
        for fidelity in session.plan.fidelities:
            study.append(evaluator.evaluate(texts, fidelity))


class Climb:
    """A training run that is a number going down by `pace` a step, and that may kill its worker once."""

    def __init__(self, pace, die_once=None):
        self.pace, self.die_once = pace, die_once
        self.course = []

    def step(self):
        if self.die_once is not None and len(self.course) == 2 and not self.die_once.exists():
            self.die_once.touch()
            os.kill(os.getpid(), 9)
        n = len(self.course) + 1
        self.course.append({"step": n, "worker": os.getpid()})
        done = n == 10
        progress = {"trained_tokens": 100 * n, "tokens": 1000, "done": done, "failure": None}
        return {"loss": 10 - self.pace * n, **progress, "course": list(self.course)}

    def save(self, directory):
        (directory / "course").write_text(json.dumps(self.course))

    def load(self, directory):
        self.course = json.loads((directory / "course").read_text())


class Diverges(Climb):
    def step(self):
        return super().step() | {"loss": math.inf, "done": True, "failure": "training diverged"}


def test_a_driver_that_was_killed_before_the_first_trial_is_continued(ray_cluster, tmp_path):
    place, sessions = tmp_path / "tune", {3: partial(Climb, 0.9), 5: partial(Climb, 0.8)}
    tuning._new_tuner(tuning._trainable(sessions), [3, 5], place, competing=False)  # what it had written
    assert (place / "tuner.pkl").is_file()
    found = train_all(sessions, place, competing=False, use_gpu=False, say=lambda line: None)
    assert {number: t.trained_tokens for number, t in found.items()} == {3: 1000, 5: 1000}
    assert {t.reason for t in found.values()} == {None}


def test_runs_compete_and_outlive_their_workers(ray_cluster, tmp_path):
    mark = tmp_path / "died"
    sessions = {3: partial(Climb, 0.9), 5: partial(Climb, 0.8, mark), 7: partial(Diverges, 0.0)}
    sessions |= {9: partial(Climb, 0.0)}
    lines = []
    found = train_all(sessions, tmp_path / "tune", competing=True, use_gpu=True, say=lines.append)
    assert mark.exists()
    assert found[3].reason is None
    assert found[3].trained_tokens == 1000
    assert [point["step"] for point in found[3].course] == list(range(1, 11))
    course = found[5].course  # however long it was let live, it went on after its death
    assert [point["step"] for point in course] == list(range(1, 1 + len(course)))
    assert len(course) >= 3
    assert len({point["worker"] for point in course}) == 2
    assert found[7].reason == "training diverged"
    assert found[9].reason.startswith("stopped early, at ")
    assert found[9].trained_tokens < 1000
    assert "trial 3: 1,000/1,000 tokens, validation loss 1.0000" in lines
    assert (found[3].state / "course").is_file()
    # A driver that comes again finds all of it, and trains nothing.
    again = train_all(sessions, tmp_path / "tune", competing=True, use_gpu=True, say=lines.append)
    assert {number: t.course for number, t in again.items()} == {n: t.course for n, t in found.items()}


@pytest.mark.usefixtures("forked_reload")
def test_a_tiny_model_is_recovered_and_saved(ray_cluster, tmp_path, monkeypatch):
    from secateur.search import app

    monkeypatch.chdir(tmp_path)  # the run is named by a relative path
    make_tiny_run(Path("run"))
    view = app.open_run("run")
    settings = recovery_settings(method="full", tokens=10240, lr=1e-3)
    trial, lines = view.baselines["uniform@0.6"], []
    with monkeypatch.context() as patch:  # training that came with the run
        (planted := tmp_path / "planted").mkdir()
        (planted / "tuner.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
        patch.setattr(Stage, "experiment", planted)
        with pytest.raises(UsageError, match=r"Expected training that was begun here, got .*planted"):
            app.recover(Path("run"), [trial], settings)
    assert not Path("ran").exists()
    (result,) = app.recover(Path("run"), [trial], settings, say=lines.append)
    view = app.open_run("run")
    m, test = view.recovered_of(trial), view.test_of(trial)
    assert m.values["trained_tokens"] == 10240
    assert m.values["loss"] < 0.9 * test.values["loss"]
    facts = json.loads((result.directory / "model" / "secateur.json").read_text())
    assert facts["measured"]["test:1024, before recovery"]["kl"] == pytest.approx(test.values["kl"], rel=1e-2)
    sparsity = sum(facts["zeros"].values()) / sum(facts["weights"].values())
    assert sparsity == pytest.approx(m.values["sparsity"], abs=1e-4)
    course = json.loads((result.directory / "recovery.json").read_text())["course"]
    assert [point["trained_tokens"] for point in course] == list(range(0, 10241, 1024))
    assert any("10,240/10,240 tokens, validation loss" in line for line in lines)
    assert not list(Path("run/recovered").glob("tune-*"))
