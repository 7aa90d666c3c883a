"""Export of a run's trial block by block: the model of the whole export, never loaded whole, continued after a stop."""

from __future__ import annotations

import json

import pytest

from secateur.pruners.export import streamed
from secateur.pruners.export.manifest import MANIFEST
from secateur.pruners.export.saving import unfinished
from secateur.search import app
from secateur.search.cli import _dispatch
from secateur.search.errors import UsageError
from tests.streaming import Stopped, saved, saving, stop, tensors

EVALUATOR = {"window": 32, "calibration_tokens": 128, "fidelities": [64, 128], "test_tokens": 128}


def searched(directory, model, space, **further):
    wanted = {
        "model": str(model),
        "dtype": "float32",
        "space": {"target": 0.5, **space},
        "controller": {"kind": "uniform"},
        "evaluator": EVALUATOR | further.pop("evaluator", {}),
        **further,
    }
    run = app.run(directory, **wanted)
    return next(t for t in run.trials() if t.measurement.values["sparsity"] > 0.4)


@pytest.fixture
def no_whole_model(monkeypatch):
    """Loading a whole model fails."""

    def fail(*of, **more):
        raise AssertionError("Expected no whole model, got one.")

    monkeypatch.setattr("secateur.pruners.models.opening.load_model", fail)


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize(
    ("space", "further"),
    [
        ({"kind": "allocation", "metric": "wanda", "step": 0.25}, {}),
        ({"kind": "allocation", "metric": "sparsegpt", "step": 0.25, "statistics": "dense"}, {}),
        ({"kind": "formula", "terminals": ["W", "X"]}, {"evaluator": {"measures": ["acceptance", "weighted_kl"]}}),
    ],
)  # fmt: skip
def test_the_model_is_that_of_the_whole_export(tmp_path, monkeypatch, space, further):
    model = saved(tmp_path / "model", "llama")
    trial = searched(tmp_path / "run", model, space, **further)
    app.export(tmp_path / "run", trial, tmp_path / "whole", stream="never")
    with monkeypatch.context() as patch:
        patch.setattr(
            "secateur.pruners.models.opening.load_model", lambda *of, **more: pytest.fail("a whole model")
        )
        summary = app.export(tmp_path / "run", trial, tmp_path / "blocks", stream="always")
    before, after = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    whole, by_block = (json.loads((tmp_path / x / MANIFEST).read_text()) for x in ("whole", "blocks"))
    assert list(by_block["measured"]) == list(whole["measured"])
    assert set(summary.measured) >= {"search:128, as exported", "test:128, as exported"}
    for at, values in whole["measured"].items():
        assert by_block["measured"][at] == pytest.approx(values, rel=1e-5, abs=1e-7)
    measured = set(by_block["measured"]["test:128, as exported"])
    assert measured >= {"kl", "ce", *further.get("evaluator", {}).get("measures", ())}
    differs = {name for name in whole if whole[name] != by_block[name]}
    assert differs <= {"checks", "files", "size_bytes", "measured"}


@pytest.mark.usefixtures("forked_reload")
def test_a_stopped_export_goes_on_by_the_same_command(tmp_path, monkeypatch, no_whole_model, capsys):
    model = saved(tmp_path / "model", "llama")
    trial = searched(tmp_path / "run", model, {"metric": "wanda", "step": 0.25}, stream="always")
    to = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(streamed, "save_file", saving(2, stop))
        with pytest.raises(Stopped):
            app.export(tmp_path / "run", trial, to)
    assert unfinished(to).is_dir()
    assert not to.exists()
    _dispatch(["export", str(tmp_path / "run"), str(trial.number), "--to", str(to)])
    assert "going on after block 2/3 of an earlier start" in capsys.readouterr().err
    assert not unfinished(to).exists()
    said = []
    assert app.export(tmp_path / "run", trial, to, say=said.append).already


@pytest.mark.usefixtures("forked_reload")
def test_structure_is_exported_whole_unless_streaming_is_asked_for(tmp_path, secateur):
    model = saved(tmp_path / "model", "llama")
    space = {"kind": "architecture", "baselines": []}
    trial = searched(tmp_path / "run", model, space, stream="always")
    export = ["export", tmp_path / "run", trial.number, "--to", tmp_path / "out"]
    status, _, err = secateur(*export, "--stream", "always")
    assert status == 2
    assert "Expected a recipe that zeros weights" in err
    assert not (tmp_path / "out").exists()
    status, _, err = secateur(*export)
    assert status == 0, err
    assert "the model is loaded whole, and not streamed" in err
    status, _, err = secateur(*export, "--stream", "often")
    assert status == 2
    assert "Expected `--stream` out of auto, always, never, got 'often'" in err


def test_a_run_with_changed_texts_is_refused_streamed_too(tmp_path):
    model = saved(tmp_path / "model", "llama")
    trial = searched(tmp_path / "run", model, {"metric": "wanda", "step": 0.25}, stream="always")
    saved(tmp_path / "model", "llama", initializer_range=0.1)
    with pytest.raises(UsageError, match="was searched with, got another model"):
        app.export(tmp_path / "run", trial, tmp_path / "out")
