"""A search over recipes that train: the tokens are counted once, the export has the measured weights, runs go on."""

from __future__ import annotations

import pytest

from secateur.evaluators.session import Session
from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.settings.settings import settings_from
from secateur.spaces.recipe.known import KNOWN, KnownRecipe

EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [128, 256], "test_tokens": 256}
FEW = {"samples": [4], "length": [32], "pool_tokens": 2048, "subsets": 2, "known": []}
SCHEDULE = {"steps": 2, "retrain": 256}
FORMS = {
    "weights": {"metric": "wanda", "schedule": {**SCHEDULE, "shape": "cubic"}},
    "structure": {"metric": "wanda_sp", "schedule": {**SCHEDULE, "loss": "kl"}},
}
COMPUTED = {"weights": 3 * 512, "structure": 4 * 512}
"""Two rounds of 256 tokens; with the backward pass, and the teacher's with ``kl``."""


@pytest.mark.parametrize("unit", FORMS)
def test_tokens_are_counted_and_the_export_is_what_was_measured(tmp_path, monkeypatch, unit):
    monkeypatch.setitem(KNOWN, "trained", KnownRecipe(unit, FORMS[unit], "", "of the test"))
    space = {
        "kind": "recipe",
        "unit": unit,
        **FEW,
        "target": 0.3,
        "start": "trained",
        "search": ["calibration"],
    }
    raw = {"space": space, "evaluator": EVALUATOR, "budget": {"evaluations": 3}}
    settings = settings_from({**raw, "controller": {"kind": "random"}})
    app.search(settings, tmp_path / "run")
    run = app.open_run(tmp_path / "run")
    found = [t.measurement for t in run.trials() if t.measurement.values and t.measurement.values["sparsity"]]
    assert found
    assert all(m.n_tokens == m.fidelity.n_tokens + COMPUTED[unit] for m in found)
    session = Session(plan(run.settings))
    data = session.data()
    data.of(run.fidelity)
    candidate = session.space.parse(found[0].candidate)
    assert "schedule" in candidate.plain
    session.pruner.prune(session.space.config(candidate), sequential=False)
    assert data.live_losses(run.fidelity)["kl"] == pytest.approx(found[0].values["kl"], rel=1e-4)
