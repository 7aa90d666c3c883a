"""Losses and further measures of a search: their settings, directions and units, in every space."""

from __future__ import annotations

import pytest

from secateur.search import app
from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.losses import LOSSES, loss_of
from secateur.search.objectives import objective, oriented
from secateur.search.results.pick import Bound
from secateur.search.settings.settings import identity, resolved, settings_from
from secateur.spaces.measurement import Fidelity, Measurement
from tests.measures import EVALUATOR, SPACES, settings

# --- settings and texts ---


def test_measures_follow_from_loss_and_objectives():
    plain = settings_from(settings())
    assert plain.measures == ()
    assert "measures" not in identity(plain)["evaluator"], "as in studies from before"
    wanted = settings_from(
        settings(objectives=["loss", "acceptance"], evaluator={**EVALUATOR, "loss": "weighted_kl"})
    )
    assert wanted.measures == ("weighted_kl", "acceptance")
    assert identity(wanted)["evaluator"]["measures"] == ["weighted_kl", "acceptance"]
    assert settings_from(resolved(wanted)) == wanted


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"loss": "wheighted_kl"},
            "`evaluator.loss` to be kl, ce, weighted_kl, acceptance, margin:<task>, got",
        ),
        ({"loss": "margin:"}, "`evaluator.loss` to be kl, ce"),
        ({"loss": "margin:piqa"}, "`evaluator.tasks` with the directory of its files for margin:piqa"),
        ({"measures": ["kl"]}, "evaluator.measures"),
    ],
)
def test_wrong_losses_are_refused(changes, error):
    with pytest.raises(UsageError, match=error.replace("(", r"\(")):
        settings_from(settings(evaluator={**EVALUATOR, **changes}))


def test_directions_units_and_bounds():
    assert objective("acceptance").direction == objective("margin:piqa").direction == "maximize"
    assert objective("loss").unit == "nats/token"
    assert objective("loss", "acceptance").unit == ""
    assert objective("loss", "margin:piqa").unit == "nats/sample"
    with pytest.raises(ValueError, match=r"Expected known `objectives`, got 'margin:'"):
        objective("margin:")
    values = {"loss": 0.25, "acceptance": 0.75, "margin:piqa": -0.5}
    trial = Trial(0, Measurement("c", Fidelity("search", 64), values))
    assert oriented(trial, ("loss", "acceptance", "margin:piqa")) == (0.25, -0.75, 0.5)
    assert Bound.parse("min-acceptance", "0.75").excess(trial, None) == 0
    assert Bound.parse("min-acceptance", "0.7501").excess(trial, None) > 0
    assert set(LOSSES) == {"kl", "ce", "weighted_kl", "acceptance"}
    assert loss_of("margin:piqa").summary == "log(1 + exp(-margin)) of the right answers in piqa"


# --- searches ---


def test_equal_seeds_give_equal_trials_with_every_loss(tmp_path):
    for loss in ("weighted_kl", "acceptance"):
        again = [
            app.run(tmp_path / f"{loss}-{i}", **settings(evaluator={**EVALUATOR, "loss": loss}))
            for i in range(2)
        ]
        values = [
            [(t.measurement.candidate, dict(t.measurement.values)) for t in run.trials()] for run in again
        ]
        assert values[0] == values[1]


@pytest.mark.parametrize("kind", SPACES)
def test_every_space_searches_for_every_loss_and_exports_its_measures(kind, tmp_path):
    space = {"kind": kind, **SPACES[kind]}
    evaluator = {**EVALUATOR, "loss": "acceptance", "measures": ["weighted_kl"]}
    run = app.run(tmp_path / "run", **settings(space=space, evaluator=evaluator))
    best = run.front()[0]
    for trial in run.trials():
        values = trial.measurement.values
        assert values["loss"] == pytest.approx(1 - values["acceptance"], abs=1e-12)
        assert values["weighted_kl"] >= 0
    trial = next(t for name, t in run.baselines.items() if name != "dense")
    assert {"acceptance", "weighted_kl"} <= set(run.test_of(best).values)
    summary = app.export(
        tmp_path / "run", trial, tmp_path / "model", calibration=None if kind == "recipe" else "dense"
    )
    for text in ("search:256", "test:128"):
        searched, exported = (summary.measured[f"{text}, as {how}"] for how in ("searched", "exported"))
        for name in ("kl", "acceptance", "weighted_kl"):
            assert exported[name] == pytest.approx(searched[name], rel=1e-3)
