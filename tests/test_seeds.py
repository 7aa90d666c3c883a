"""Seeds of a search: one from which the others derive, each with a setting of its own, and the line that says so."""

import pytest

from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.results.run import open_run
from secateur.search.settings.seeds import seeds_line
from secateur.search.settings.settings import identity, load_settings, resolved, settings_from

TRAINED = ["evaluator.fidelities=[2048]", "evaluator.training={tokens: [512]}"]


@pytest.mark.parametrize(
    ("overrides", "data", "training"),
    [
        ([], 0, 0),
        (["seed=3"], 3, 3),
        (["seed=3", "evaluator.seed=1"], 1, 1),
        (["seed=3", "evaluator.training.seed=2"], 3, 2),
        (["seed=3", "evaluator.seed=1", "evaluator.training.seed=2"], 1, 2),
    ],
)
def test_seeds_derive_from_the_one_unless_they_are_given(overrides, data, training):
    settings = load_settings(None, [*TRAINED, *overrides])
    assert (settings.data_seed, settings.training_seed) == (data, training)
    made = plan(settings)
    assert (made.seed, made.training.seed) == (data, training)
    again = settings_from(resolved(settings))
    assert (again.seed, again.data_seed, again.training_seed) == (settings.seed, data, training)
    assert identity(again) == identity(settings)


def test_identity_has_a_training_seed_only_where_it_differs():
    assert "seed" not in identity(load_settings(None, TRAINED))["evaluator"]["training"]
    other = identity(load_settings(None, [*TRAINED, "evaluator.training.seed=2"]))
    assert other["evaluator"]["training"]["seed"] == 2


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["seed=1"],
            "seed 1 decides: proposals of evolution, windows of the calibration and search texts. The same for "
            "every seed: the test text",
        ),
        (
            ["seed=1", "controller.kind=uniform", "space.metric=random"],
            "seed 1 decides: windows of the calibration and search texts, scores of the metric random. The "
            "same for every seed: the test text and the controller uniform, which draws nothing at random",
        ),
        (
            [*TRAINED, "seed=1", "controller.kind=uniform", "evaluator.seed=0"],
            "seed 1 decides: nothing; `evaluator.seed` 0 decides: windows of the calibration and search texts, order "
            "of light training. The same for every seed: the test text and the controller uniform, which draws "
            "nothing at random",
        ),
    ],
)
def test_the_line_says_which_parts_depend_on_which_seed(overrides, line):
    assert seeds_line(load_settings(None, overrides)) == line


SMALL = {
    "space": {"target": 0.5, "step": 0.25},
    "controller": {"kind": "uniform"},
    "evaluator": {
        "window": 128,
        "calibration_tokens": 512,
        "test_tokens": 256,
        "fidelities": [256],
    },
}


def test_another_seed_gives_another_loss_even_of_uniform(tmp_path):
    said: list[str] = []
    losses = []
    for seed in (0, 1):
        run = app.run(tmp_path / str(seed), say=said.append, seed=seed, **SMALL)
        losses.append(run.baselines["uniform@0.5"].measurement.values["loss"])
    assert losses[0] != losses[1]
    assert said[0].startswith("seed 0 decides: windows")


def test_a_recorded_run_keeps_its_data_under_another_seed(tmp_path):
    raw = {**SMALL, "evaluator": {**SMALL["evaluator"], "seed": 0}}
    before = app.run(
        tmp_path / "run", seed=1, **raw
    )  # as runs were recorded when `seed` was the controller's alone
    said: list[str] = []
    after = app.run(tmp_path / "run", say=said.append, seed=1, **SMALL)
    assert len(after.study.trials) == len(before.study.trials)
    assert open_run(tmp_path / "run").settings.data_seed == 0
    assert "`evaluator.seed` 0 decides: windows of the calibration and search texts" in said[0]
