"""Calibration of experts: tokens are counted, experts without enough are named, and all tokens are a choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.calibration.tokens import Calibration
from secateur.pruners.experts.routing import ENOUGH, every_token, routed_tokens, starved_experts
from secateur.pruners.models.discover import dissect
from secateur.search import app
from secateur.search.app.describing import describe_model
from secateur.search.results.run import notes_on_model
from secateur.search.settings.settings import identity, settings_from
from tests.mixtures import MIXTURES, VOCABULARY, make_mixture
from tests.models import small_anatomy

IDS = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MIXTURES)
def test_routed_tokens_are_those_of_the_evidence(name: str) -> None:
    anatomy = dissect(make_mixture(name))
    counts = routed_tokens(anatomy, IDS)
    for part in stream_blocks(anatomy, IDS, experts=True):
        if part.experts is not None:
            names = [f"{part.experts.mixture.name}.experts.{index}" for index in range(6)]
            assert [counts[name] for name in names] == part.experts.n_routed.tolist()
    assert len(counts) == 6 * sum(block.mixture is not None for block in anatomy.blocks)
    assert starved_experts(anatomy, IDS) == {name: n for name, n in counts.items() if n < ENOUGH}


def test_a_model_without_mixtures_has_no_experts_to_starve() -> None:
    assert starved_experts(small_anatomy(), IDS % 97) == {}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_statistics_of_all_experts_are_of_all_tokens(name: str) -> None:
    """The output stays, so that later blocks and importances of experts are the same."""
    anatomy = dissect(make_mixture(name))
    *_, routed = stream_blocks(anatomy, IDS, inputs="moments", experts=True)
    *_, whole = stream_blocks(replace(anatomy, all_experts=True), IDS, inputs="moments", experts=True)
    assert routed.experts is not None
    assert whole.experts is not None
    torch.testing.assert_close(whole.experts.n_routed, routed.experts.n_routed)
    torch.testing.assert_close(whole.experts.gated_norms, routed.experts.gated_norms)
    experts = [linear.name for linear in routed.block.linears if linear.expert is not None]
    assert {whole.inputs[name].n_tokens for name in experts} == {IDS.numel()}
    assert sum(routed.inputs[name].n_tokens for name in experts) < len(experts) * IDS.numel()
    up = next(linear for linear in routed.block.linears if linear.expert is not None and linear.role == "up")
    torch.testing.assert_close(
        whole.inputs[up.name].sum_squares, whole.experts.hidden.float().square().sum(0), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(  # the router's weights still count: those of other tokens are 0
        whole.inputs[up.name].routed_squares, routed.inputs[up.name].routed_squares
    )
    with every_token(routed.block):
        assert routed.block.mixture is not None
        assert routed.block.mixture.experts.every_token
    assert not routed.block.mixture.experts.every_token


def test_the_choice_is_part_of_what_measurements_depend_on() -> None:
    assert Calibration(IDS, "t").sha256 + "-all-experts" == Calibration(IDS, "t", all_experts=True).sha256
    plain, widened = (
        settings_from({"model": "tiny-moe", "evaluator": {"moe_all_experts": value}})
        for value in (False, True)
    )
    assert identity(plain) == identity(widened)  # it is among the contents, which old runs lack


def test_experts_without_enough_tokens_are_named() -> None:
    [note] = notes_on_model(0.0, (), {f"model.layers.0.mlp.experts.{n}": 9 - n for n in range(10)})
    assert note.startswith("Experts that few calibration tokens are routed to")
    assert "model.layers.0.mlp.experts.9 (0), model.layers.0.mlp.experts.8 (1)" in note
    assert note.endswith("and 2 more. Use more calibration tokens, or `evaluator.moe_all_experts`.")
    found = describe_model("tiny-moe")
    assert found["units"] == "works"
    assert found["starved_experts"]["model.layers.0.mlp.experts.2"] < ENOUGH
    assert describe_model("tiny")["starved_experts"] == {}


def test_a_run_names_them_and_a_recipe_keeps_the_choice(tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "model": "tiny-moe",
        "space": {"kind": "allocation", "metric": "wanda", "target": 0.5, "granularity": "block"},
        "controller": {"kind": "uniform"},
        "executor": {"kind": "local", "threads": 1},
        "evaluator": {"fidelities": [128], "window": 128, "calibration_tokens": 256, "test_tokens": 128},
    }
    runs = []
    for value in (False, True):
        directory = tmp_path / str(value)
        settings = settings_from({**raw, "evaluator": {**raw["evaluator"], "moe_all_experts": value}})
        app.search(settings, directory)
        runs.append(app.open_run(directory))
    contents = [run.study.about.identity["content"]["calibration_tokens"] for run in runs]
    assert contents[1] == f"{contents[0]}-all-experts"
    for run, value in zip(runs, (False, True), strict=True):
        assert run.study.about.facts["starved_experts"]
        assert any("Experts that few calibration tokens" in note for note in run.model_notes)
        trial = next(t for t in run.study.trials if t.measurement.values["sparsity"] > 0)
        text = app.found.written(run, trial)
        assert ("moe_all_experts: true" in text) == value
    losses = [max(t.measurement.values["loss"] for t in run.study.trials) for run in runs]
    assert losses[0] != losses[1]
