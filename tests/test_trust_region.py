"""Searches by curvature and gradients: on weights and on structure, from settings to a continued run."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from secateur.search import app
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.spaces.architecture.candidate import Kept
from tests.models import random_tokens
from tests.structures import make_case

EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [256, 512], "test_tokens": 256}
SPACES = {
    "allocation": {"kind": "allocation", "metric": "wanda", "target": 0.6, "max_sparsity": 0.9},
    "architecture": {"kind": "architecture", "target": 0.3, "repair": ["none"], "importance": "flap"},
}


def settings(kind: str, controller: str, evaluations: int, **changes):
    raw = {"space": SPACES[kind], "evaluator": EVALUATOR, "budget": {"evaluations": evaluations}}
    return settings_from({**raw, "controller": {"kind": controller, **changes}})


def lines_of(directory) -> list[dict]:
    """Measurements of a run without what depends on the clock."""
    lines = map(json.loads, (directory / "measurements.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key not in {"seconds", "worker", "started", "ended"}}
        for line in lines
    ]


@pytest.mark.parametrize("kind", SPACES)
def test_steps_beat_uniform_and_a_stopped_search_goes_on_as_an_unbroken_one(kind, tmp_path):
    app.search(settings(kind, "trust_region", 5), tmp_path / "parts")
    app.search(settings(kind, "trust_region", 12), tmp_path / "parts")
    app.search(settings(kind, "trust_region", 12), tmp_path / "whole")
    whole = lines_of(tmp_path / "whole")
    keys = [(line["candidate"], line["fidelity"]) for line in whole]
    parts = {(line["candidate"], line["fidelity"]): line for line in lines_of(tmp_path / "parts")}
    assert [parts[key] for key in keys] == whole
    gradients = [line for line in whole if line["fidelity"].startswith("gradient")]
    assert len(gradients) >= 2
    assert all(line["tokens"] == 3 * int(line["fidelity"].split(":")[1]) for line in gradients)
    searched = [line for line in whole if line["fidelity"] == "search:512"]
    dense, uniform, *found = [line["values"]["loss"] for line in searched]
    assert dense == pytest.approx(0, abs=1e-5)
    assert min(found) < 0.9 * uniform


def test_what_no_gradient_fits_into_is_left_to_generations(tmp_path):
    def run(directory) -> list[dict]:
        raw = {
            "space": SPACES["allocation"],
            "evaluator": EVALUATOR,
            "controller": {"kind": "evolution", "start": "trust_region", "offspring": 1, "survivors": [1]},
            "budget": {"tokens": 6144},
        }
        app.search(settings_from(raw), directory)
        return [line for line in lines_of(directory) if not line["fidelity"].startswith("test")]

    whole = run(tmp_path / "whole")
    spent = sum(line["tokens"] for line in whole)
    last = max(i for i, line in enumerate(whole) if line["fidelity"].startswith("gradient"))
    assert 6144 - 256 < spent <= 6144
    assert "search:256" in [line["fidelity"] for line in whole[last:]]
    study = tmp_path / "whole" / "measurements.jsonl"
    lines = study.read_text().splitlines(keepends=True)
    study.write_text("".join(lines[: last + 2]))
    again = run(tmp_path / "whole")
    assert [(x["candidate"], x["values"]) for x in again] == [(x["candidate"], x["values"]) for x in whole]


def test_curvature_alone_beats_uniform_without_measuring_a_slot(tmp_path):
    app.search(settings("allocation", "sensitivity", 9, by="curvature"), tmp_path)
    lines = [line for line in lines_of(tmp_path) if not line["fidelity"].startswith("test")]
    assert [line["fidelity"] for line in lines] == ["search:512", "search:512", "gradient:512", "search:512"]
    assert lines[3]["values"]["loss"] < 0.95 * lines[1]["values"]["loss"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {"kind": "formula", "target": 0.5}}, "slots can be measured alone"),
        ({"controller": {"kind": "trust_region", "n_tokens": 100}}, "whole windows of 64"),
        ({"evaluator": EVALUATOR | {"fidelities": [81920]}}, "a longer text"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(changes, words, tmp_path):
    raw = {"space": SPACES["allocation"], "evaluator": EVALUATOR, "controller": {"kind": "trust_region"}}
    with pytest.raises(UsageError, match=words):
        app.search(settings_from(raw | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma2"])
def test_zero_columns_in_dense_shapes_compute_what_the_cut_model_computes(family, tmp_path):
    case = make_case(family, tmp_path)
    anatomy, store, tokens = case.anatomy, case.store, random_tokens(2, 6)
    for kept, repair in itertools.product((Kept(1, 20), Kept(1, 10)), ("none", "obs")):
        dense = {linear.name: linear.weight for linear in anatomy.linears}
        for block in range(len(anatomy.blocks)):
            store.cut(block, kept, repair)
        cut = anatomy.model(input_ids=tokens).logits
        store.restore()
        for block in anatomy.blocks:
            outputs = store.outputs(block.index, kept, repair)
            assert len(outputs) == 2
            for linear in block.linears:
                linear.point_to(outputs.get(linear.name, linear.weight))
        torch.testing.assert_close(anatomy.model(input_ids=tokens).logits, cut, rtol=1e-4, atol=1e-4)
        for linear in anatomy.linears:
            linear.point_to(dense[linear.name])
