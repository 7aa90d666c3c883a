"""Scores of whole blocks, and the allocations that are made from them."""

from __future__ import annotations

import json
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.calibration.gradients import collect_gradients
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.depth.depth import depth_scores
from secateur.pruners.models.discover import dissect
from secateur.search import app
from secateur.search.app.methods import method_rows
from secateur.search.results.run import open_run
from secateur.search.settings.settings import settings_from
from secateur.spaces.architecture.candidate import GONE
from secateur.spaces.architecture.scores import Scores
from secateur.spaces.architecture.settings import ArchitectureSettings, build_architecture, scored_baselines
from secateur.spaces.methods import DEPTH, RULES
from secateur.spaces.shape import BlockShape, ModelShape
from tests.structures import CONFIGS, TOKENS, build, logits

N_BLOCKS = 8
INFLUENCE = (0.8, 0.5, 0.3, 0.1, 0.2, 0.4, 0.6, 0.7)


@pytest.fixture(scope="module")
def anatomy():
    config = deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = N_BLOCKS
    return dissect(build(config))


@pytest.fixture(scope="module")
def scores(anatomy):
    whole = ModelStatistics(N_BLOCKS, collect_gradients(anatomy, TOKENS, ("mean",)), INFLUENCE)
    return {name: row.function(anatomy, TOKENS, whole) for name, row in DEPTH.items()}


def test_the_loss_without_a_block_is_that_of_the_model_without_it(anatomy, scores):
    model = deepcopy(anatomy.model)
    blocks = list(model.model.layers)
    for gone in range(N_BLOCKS):
        model.model.layers = torch.nn.ModuleList(x for i, x in enumerate(blocks) if i != gone)
        found = logits(model)
        loss = F.cross_entropy(found[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        assert scores["shortened_ppl"][gone] == pytest.approx(float(loss), rel=1e-5)


def test_taylor_plus_sums_over_a_block_and_spares_the_ends(anatomy, scores):
    gradients = collect_gradients(anatomy, TOKENS, ("mean",))["mean"]
    for block, found in zip(anatomy.blocks, scores["shortened_taylor"], strict=True):
        wanted = sum(float((x.weight * gradients[x.name]).abs().sum()) for x in block.linears)
        assert found == (pytest.approx(wanted, rel=1e-5) if 4 <= block.index < 6 else math.inf)


def test_scores_are_kept_beside_the_store(anatomy, scores, tmp_path, monkeypatch):
    store = tmp_path / "levels"
    found = depth_scores(["last", "shortened_taylor"], anatomy, TOKENS, store, "m t", INFLUENCE)
    assert found == {name: scores[name] for name in found}
    rest = DEPTH.keys() - found.keys()
    assert depth_scores(sorted(rest), anatomy, TOKENS, store, "m t", INFLUENCE).keys() == rest
    kept = json.loads((tmp_path / "levels-depth.json").read_text())
    assert kept["scores"].keys() == DEPTH.keys()
    monkeypatch.setattr(anatomy.model, "forward", None)  # would be called otherwise
    assert depth_scores(list(DEPTH), anatomy, TOKENS, store, "m t", INFLUENCE) == scores
    with pytest.raises(TypeError):
        depth_scores(["shortened_ppl"], anatomy, TOKENS, store, "m another", INFLUENCE)


# --- allocations ---


def space(**settings):
    block = BlockShape(2, 100, 10, 48, 10, 10, 100, 10, 4)
    shape = ModelShape(10_000, 2, 10_000, 1_000, blocks=(block,) * N_BLOCKS)
    return build_architecture(ArchitectureSettings(target=0.25, **settings), (), shape)


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_that_score_least_are_dropped(scores, tied):
    given = Scores((), (), (), scores)
    made = space(tied=tied)
    gone = {
        kind: {i for i, x in enumerate(made.from_scores(kind, given, 0).blocks) if x == GONE}
        for kind in DEPTH
    }
    for kind, found in gone.items():
        order = sorted(range(1, N_BLOCKS), key=lambda block, kind=kind: scores[kind][block])
        assert found == {*order[:2]}
    assert gone["last"] == {6, 7}
    assert gone["shortened_taylor"] == {4, 5}


def test_they_are_baselines_where_they_are_asked_for():
    names = ["last", "shortened_ppl", "shortened_taylor"]
    assert ArchitectureSettings().scored == ("flap", "shortgpt")
    assert ArchitectureSettings(baselines=["shortened_ppl", "last"]).scored == ("shortened_ppl", "last")
    for name in names:
        with pytest.raises(ValueError, match=f"`baselines` that `units` can make, got {name}"):
            ArchitectureSettings(units=["groups", "channels"], baselines=[name])


def test_every_method_is_listed_once():
    rows = method_rows()
    baselines = [row["name"] for row in rows if row["setting"] == "space.baselines"]
    assert baselines == [*scored_baselines()]
    assert len({(row["setting"], row["unit"], row["name"]) for row in rows}) == len(rows)
    rules = {row["name"]: row["unit"] for row in rows if row["setting"] == "space.allocations"}
    assert {*rules} == {*RULES}
    assert (rules["owl"], rules["flap"]) == ("weight", "KV group, channel")
    nirvana = next(row for row in rows if row["name"] == "nirvana")
    assert (nirvana["unit"], nirvana["needs"]) == ("KV group, channel", "data, gradients (4 bytes a weight)")


def test_a_search_over_architectures_uses_them(tmp_path):
    names = ["last", "shortened_ppl", "shortened_taylor"]
    raw = {
        "space": {
            "kind": "architecture",
            "target": 0.3,
            "ffn_step": 64,
            "importance": "llm_pruner_mixed",
            "repair": ["liar", "admm"],
            "baselines": names,
        },
        "evaluator": {"window": 64, "calibration_tokens": 256, "fidelities": [128], "test_tokens": 128},
        "controller": {"kind": "random"},
        "budget": {"evaluations": 7},
    }
    app.search(settings_from(raw), tmp_path / "run")
    run = open_run(tmp_path / "run")
    for name in names:
        assert f"{name}@0.3" in run.baselines
    repairs = {trial.measurement.candidate.rpartition("=")[2] for trial in run.trials()}
    assert repairs >= {"liar", "admm"}
    assert all(math.isfinite(trial.measurement.values["loss"]) for trial in run.trials())
