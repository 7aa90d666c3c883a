"""Published searches as settings: their numbers, that they fit their models, and that they run when scaled down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from secateur.search import app
from secateur.search.settings.settings import load_settings
from secateur.spaces.levels import n_zeros, sparsities_of
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import BlockShape, ModelShape, Prunable

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WIDTH, N_BLOCKS, HEAD = 4096, 32, 128
MODELS = {
    **dict.fromkeys(("evopress", "nirvana"), (8, 14336)),
    **dict.fromkeys(("darwinlm", "search-llm", "pruner-zero", "adapruner"), (32, 11008)),
}
"""KV heads and FFN channels of the model of each: Mistral-7B or Llama-3.1-8B, or Llama(-2)-7B."""

DATA = "evaluator.data={calibration: docs, search: docs, test: docs}"
ON_TINY = ["model=tiny", "dtype=float32", DATA, "evaluator.window=64", "evaluator.test_tokens=128"]
SCALED = {
    "evopress": [
        *("space.step_weights=4000", "controller.offspring=3", "controller.survivors=[2, 1]"),
        *("evaluator.fidelities=[64, 128, 192]", "evaluator.calibration_tokens=256", "budget.evaluations=12"),
    ],
    "darwinlm": [
        *("space.ffn_step=96", "controller.offspring=3", "controller.survivors=[2, 1, 1]"),
        *("evaluator.fidelities=[64, 128, 192, 256]", "evaluator.training.tokens=[64, 128, 192, 256]"),
        *("evaluator.calibration_tokens=256", "budget.evaluations=9"),
    ],
    "search-llm": [
        *("space.channels=32", "controller.offspring=4", "controller.parents=3"),
        *("evaluator.fidelities=[128]", "evaluator.calibration_tokens=256", "budget.evaluations=12"),
    ],
    "pruner-zero": [
        *("evaluator.fidelities=[128]", "evaluator.calibration_tokens=256", "budget.evaluations=8"),
        "controller.start=4",
    ],
    "adapruner": [
        *("space.samples=[4, 8]", "space.length=[64]", "space.pool_tokens=2048", "space.subsets=2"),
        *("evaluator.fidelities=[128]", "evaluator.calibration_tokens=256", "budget.evaluations=8"),
        "controller.start=1",
    ],
    "nirvana": [
        *("space.samples=[4]", "space.length=[64]", "space.pool_tokens=2048", "space.subsets=4"),
        *("evaluator.fidelities=[128]", "evaluator.calibration_tokens=256", "budget.evaluations=5"),
    ],
}


def settings_of(name: str, *overrides: str):
    return load_settings(EXAMPLES / f"{name}.yaml", overrides)


def space_of(name: str):
    """Space of a published search on its own model's sizes."""
    (n_groups, ffn), settings = MODELS[name], settings_of(name)
    sizes = {
        "self_attn.q_proj": WIDTH**2,
        "self_attn.k_proj": n_groups * HEAD * WIDTH,
        "self_attn.v_proj": n_groups * HEAD * WIDTH,
        "self_attn.o_proj": WIDTH**2,
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), ffn * WIDTH),
    }
    linears = [
        Prunable(f"model.layers.{block}.{linear}", block, "mlp" if "mlp" in linear else "attention", n)
        for block in range(N_BLOCKS)
        for linear, n in sizes.items()
    ]
    group = (sizes["self_attn.q_proj"] + sizes["self_attn.k_proj"]) * 2 // n_groups
    block = BlockShape(n_groups, group, WIDTH, ffn, 3 * WIDTH, WIDTH, group, 3 * WIDTH, 4 * HEAD)
    shape = ModelShape(7 * 10**9, 2, 7 * 10**9, N_BLOCKS * n_groups * 4 * HEAD, (block,) * N_BLOCKS)
    return SPACES[settings.space.kind].build(settings.space, linears, shape)


@pytest.mark.parametrize("name", SCALED)
def test_it_runs_on_the_embedded_model_when_scaled_down(name, tmp_path):
    settings = settings_of(name, *ON_TINY, *SCALED[name])
    app.search(settings, tmp_path / name)
    trials = app.open_run(tmp_path / name).trials()
    found = [trial for trial in trials if trial.number >= len(app.open_run(tmp_path / name).baselines)]
    assert found, "candidates of its own reach the largest fidelity"


@pytest.mark.parametrize("name", MODELS)
def test_it_fits_its_own_model(name):
    space, rng = space_of(name), np.random.default_rng(0)
    candidate = space.mutate(space.sample(rng, 0), rng)
    assert space.target_of(candidate) == 0
    assert space.parse(candidate.text) == candidate


def test_nirvana_measures_each_subset_once(tmp_path):
    app.search(settings_of("nirvana", *ON_TINY, *SCALED["nirvana"]), tmp_path / "run")
    forms = [Recipe.parse(trial.measurement.candidate) for trial in app.open_run(tmp_path / "run").trials()]
    plain = [recipe.plain for recipe in forms if not recipe.is_dense]
    assert sorted(form["calibration"]["subset"] for form in plain) == [0, 1, 2, 3]
    assert {form["metric"]["name"] for form in plain} == {"nirvana"}
    assert {form["allocation"]["gamma"] for form in plain} == {3.36}


def test_evopress_is_its_released_script():
    settings, space = settings_of("evopress"), space_of("evopress")
    evolution, evaluator = settings.controller, settings.evaluator
    stages = list(zip((64, *evolution.survivors), evaluator.fidelities, strict=True))
    assert stages == [(64, 2048), (8, 16384), (2, 65536)]
    assert settings.budget.evaluations == 400 * (64 + 8 + 2) + 2
    up = sparsities_of(space.levels, 14336 * 4096)
    zeros = [n_zeros(level, 14336 * 4096) for level in up]
    assert len(up) == 1 + 17
    assert set(np.diff(zeros[1:])) == {1_000_000}
    assert zeros[9] == n_zeros(0.7, 14336 * 4096)
    small = [n_zeros(level, 1024 * 4096) for level in sparsities_of(space.levels, 1024 * 4096)]
    assert len(small) == 1 + 2 + 1 + 1, (
        "below and above 70 %: what fits into a projection of 4.2 million weights"
    )


def test_darwinlm_is_its_released_script():
    settings, space = settings_of("darwinlm"), space_of("darwinlm")
    evolution, evaluator = settings.controller, settings.evaluator
    trained = [round(n / 10_000) * 10_000 for n in evaluator.training.tokens]
    stages = list(zip((16, *evolution.survivors), evaluator.fidelities, trained, strict=True))
    assert stages == [(16, 1024, 10_000), (8, 2048, 50_000), (4, 4096, 100_000), (2, 8192, 200_000)]
    assert (evaluator.training.learn, evaluator.training.loss, evaluator.training.rate) == (
        "full",
        "ce",
        1e-5,
    )
    assert settings.budget.evaluations == 200 * (16 + 8 + 4 + 2) + 2
    uniform = space.baselines()["uniform@0.5"]
    assert {kept.kv_groups for kept in uniform.blocks} == {16}
    assert {11008 - kept.ffn for kept in uniform.blocks} == {5 * 1101}, "level 5 of 10"


def test_darwinlm_switches_levels_of_attentions_or_of_mlps():
    space, rng = space_of("darwinlm"), np.random.default_rng(0)
    parent = space.baselines()["uniform@0.5"]
    totals = np.sum([kept.units for kept in parent.blocks], axis=0)
    kinds = []
    for _ in range(400):
        child = space.mutate(parent, rng)
        assert child != parent
        units = np.array([kept.units for kept in child.blocks])
        changed = units != np.array([kept.units for kept in parent.blocks])
        assert (units.sum(axis=0) == totals).all()
        assert changed.sum() <= 6, "at most three switches"
        if changed.sum() == 2:
            kinds.append(int(changed.any(axis=0).argmax()))
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.1), "as many attentions as MLPs"
    gone = np.zeros(2, bool)
    for _ in range(3000):
        parent = space.mutate(parent, rng)
        gone |= (np.array([kept.units for kept in parent.blocks]) == 0).any(axis=0)
    assert gone.all(), "sub-layers go whole at their last level"


def test_search_llm_is_its_released_script():
    settings, space = settings_of("search-llm"), space_of("search-llm")
    evolution, evaluator = settings.controller, settings.evaluator
    assert (evolution.offspring, evolution.parents, evolution.start) == (500, 300, "random")
    assert evolution.crossover == pytest.approx(100 / 450, abs=0.01)
    assert evaluator.fidelities == (5 * 2048,)
    assert settings.budget.evaluations == 30 * 500 + 3
    uniform = space.baselines()["uniform@0.2"]
    assert space.cost(uniform)["sparsity"] == pytest.approx(0.2, abs=0.001)
    assert len(uniform.text) < 32 * (8 + 43 + 2) + 10, "a candidate is 1.7 kB"
