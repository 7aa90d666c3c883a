"""Forecasts beside the truth, in what commands made: pruned and recovered models, and reports."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from secateur.search import app
from secateur.search.recovery.stage import Recovered
from secateur.search.show.forecast import size
from secateur.search.show.report import write_report
from secateur.search.study.foreseen import FORECAST, read_foreseen
from secateur.spaces.measurement import Fidelity
from tests.test_forecast import QUICK


@pytest.mark.usefixtures("forked_reload")
def test_a_pruned_model_has_its_forecast_beside_the_truth(tmp_path, secateur):
    model = tmp_path / "m"
    prune = [
        "prune",
        "tiny",
        "--recipe",
        "wanda",
        "--sparsity",
        "0.5",
        "--to",
        model,
        "--tokens",
        "128",
        "--window",
        "64",
    ]
    status, out, err = secateur(*prune)
    assert status == 0, err
    record = json.loads((model / "forecast.json").read_text())
    weights = 2 * 1_705_600
    assert record["forecast"]["recipe"]
    assert record["forecast"]["left"] == record["forecast"]["peak"]["disk"] == weights
    assert weights <= record["truth"]["disk"] < weights + 1e6
    assert record["truth"]["driver"] > 1e8
    assert f"disk 3.41 MB, measured {size(record['truth']['disk'])}" in out
    before = (model / "forecast.json").read_bytes()
    status, out, err = secateur(*prune)  # exported before: nothing was made
    assert status == 0, err
    assert (model / "forecast.json").read_bytes() == before


def test_a_recovery_has_its_forecast_beside_the_truth_and_in_the_report(tmp_path, secateur, monkeypatch):
    run, made = tmp_path / "run", tmp_path / "run" / "recovered" / "1-4096"
    status, _, err = secateur("search", *QUICK, "--run", run)
    assert status == 0, err
    trial = app.open_run(run).front()[0]
    measured = replace(trial.measurement, fidelity=Fidelity("recovered", 4096), seconds=2.5)

    made.mkdir(parents=True)
    for note in ("was there already", ""):
        assert not (made / "forecast.json").exists()
        results = [Recovered(trial.number, made, measured, note)]
        monkeypatch.setattr(app, "recover", lambda *of, results=results, **more: results)
        status, out, err = secateur("recover", run, trial.number, "--tokens", 4096, "--method", "norms")
        assert status == 0, err
    record = json.loads((made / "forecast.json").read_text())
    assert record["truth"]["seconds"] == 2.5, "of the training, which alone was foretold"
    assert record["forecast"]["method"] == "norms"
    assert record["forecast"]["left"] == 2 * 1_705_600
    assert "disk 3.41 MB, measured 0 B" in out
    write_report(app.open_run(run))
    page = (run / "report" / "index.html").read_text()
    assert "forecast of the search" in page
    assert page.index("forecast of the recovery 1-4096") < page.index("disk 3.41 MB, measured ")


def test_a_record_of_old_without_what_is_left_is_read(tmp_path):
    forecast = {"driver": 1, "seconds": None, "peak": {"disk": 5}}
    truth = {"driver": 2.0, "disk": 3.0, "seconds": 4.0}
    (tmp_path / FORECAST).write_text(json.dumps({"forecast": forecast, "truth": truth}))
    assert read_foreseen(tmp_path) == ({**forecast, "left": 5}, truth)
