"""Recipes that remove routed experts: planned, carried out by reference and for good, searched, and run by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.pool import build_pools
from secateur.pruners.experts import scores
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.shape import model_shape
from secateur.pruners.pruner import DenseModel, InfeasibleError
from secateur.pruners.recipes.context import RecipeContext
from secateur.pruners.recipes.plan import DENSE
from secateur.pruners.recipes.pruner import RecipePruner
from secateur.search import app
from secateur.search.app.recipe_file import known_recipe
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.known import KNOWN
from tests.mixtures import VOCABULARY, make_mixture
from tests.models import random_tokens, small_llama

CALIBRATION = {"sources": {"calibration": 1}, "samples": 4, "length": 32}
TOKENS = random_tokens(2, 16, seed=7, vocab_size=VOCABULARY)
EXPERTS = [name for name, row in KNOWN.items() if row.unit == "experts"]


def config(sparsity: float = 0.5, metric: str = "reap", unit: str = "experts", **changes: Any) -> Any:
    return completed(
        {"unit": unit, "sparsity": sparsity, "metric": metric, "calibration": CALIBRATION, **changes}
    )


def context_of(model: Any, directory: Path, protect: tuple[str, ...] = ()) -> RecipeContext:
    anatomy = dissect(model)
    pools = build_pools(
        anatomy, {"calibration": random_tokens(1, 512, seed=5, vocab_size=VOCABULARY)[0]}, look=True
    )
    cache = StatisticsCache(directory, sys.maxsize)
    shape = model_shape(anatomy, 8, 4)
    return RecipeContext(anatomy, "toy", pools, cache, shape, seed=0, dampening=0.01, protect=protect)


def pruner_of(context: RecipeContext, unit: str = "experts") -> RecipePruner:
    pruner = RecipePruner(SimpleNamespace(unit=unit), DenseModel(context.anatomy, "toy", context.shape))
    pruner.use(context)
    return pruner


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", EXPERTS)
def test_every_known_recipe_of_experts_is_measured_by_reference_as_it_is_carried_out(
    name: str, tmp_path: Path
) -> None:
    model = make_mixture("mixtral")
    pruner, dense = pruner_of(context_of(model, tmp_path)), logits(model)
    wanted = config(1 / 3, **KNOWN[name].form)
    plan = pruner.plan(wanted)
    assert plan is not None
    counts = [kept.ffn for kept in plan.kept]
    assert counts == [4, 4] or (name == "mc_smoe" and sum(counts) == 8)  # one threshold for both
    assert [len(units.channels) for units in plan.units] == counts
    assert plan.costs["sparsity"] == pytest.approx(1 / 3)
    for block, key in enumerate(pruner.keys(wanted)):
        pruner.apply(block, key)
    measured = logits(model)
    assert not torch.allclose(measured, dense)
    pruner.restore()
    assert torch.equal(logits(model), dense)
    pruner.prune(wanted, sequential=False)
    torch.testing.assert_close(logits(model), measured, rtol=0, atol=1e-5 * float(dense.abs().max()))
    assert plan.costs["params"] == sum(p.numel() for p in model.parameters())


def test_the_experts_that_score_highest_stay(tmp_path: Path) -> None:
    context = context_of(make_mixture("mixtral"), tmp_path)
    pruner = pruner_of(context)
    plan = pruner.plan(config(0.5, "reap"))
    assert plan is not None
    statistics = context.sample(config()["calibration"]).statistics
    for index, units in enumerate(plan.units):
        ranked = scores.reap(statistics.experts(index)).argsort(descending=True).tolist()
        assert units.channels == tuple(sorted(ranked[:3]))


def test_statistics_of_experts_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = config()["calibration"]
    first = context_of(make_mixture("mixtral"), tmp_path).sample(calibration).statistics.experts(1)
    monkeypatch.setattr("secateur.pruners.calibration.collected.stream_blocks", None)
    again = context_of(make_mixture("mixtral"), tmp_path).sample(calibration).statistics.experts(1)
    assert torch.equal(first.hidden, again.hidden)
    for name in ("n_routed", "gates", "norms", "gated_norms", "contributions"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert int(again.n_routed.sum()) == 2 * 4 * 32


def test_rules_spread_experts_over_the_blocks(tmp_path: Path) -> None:
    """One threshold keeps unequal numbers, the same in total; a block that is protected keeps all."""
    pruner = pruner_of(context_of(make_mixture("mixtral", num_hidden_layers=4), tmp_path))
    rule = {"rule": "global", "normalise": "none", "cost": 0}
    plan = pruner.plan(config(0.5, "frequency", allocation=rule))
    assert plan is not None
    counts = [kept.ffn for kept in plan.kept]
    assert sum(counts) == 12
    assert len(set(counts)) > 1
    tilted = pruner.plan(config(0.25, allocation={"rule": "uniform", "skip_first": 0.5, "skip_last": 0}))
    assert tilted is not None
    assert [kept.ffn for kept in tilted.kept] == [6, 6, 3, 3]
    held = pruner_of(
        context_of(make_mixture("mixtral"), tmp_path / "held", protect=("*layers.1.mlp.experts*",))
    ).plan(config(1 / 3))
    assert held is not None
    assert [kept.ffn for kept in held.kept] == [2, 6]
    assert held.keys[1] == DENSE


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "phimoe"])
@pytest.mark.parametrize("metric", ["frequency", "nae"])
def test_a_limited_router_keeps_what_it_works_with(name: str, metric: str, tmp_path: Path) -> None:
    context = context_of(make_mixture(name), tmp_path)
    mixtures = [block.mixture for block in context.anatomy.blocks if block.mixture]
    plan = pruner_of(context).plan(config(1 / 3, metric))
    assert plan is not None
    for block, kept, units in zip(context.anatomy.blocks, plan.kept, plan.units, strict=True):
        if block.mixture is None:
            assert kept == block.whole
        else:
            assert kept.ffn == 4
            assert len(set(block.mixture.groups_of(units.channels))) == 1
    if mixtures[0].fewest > 1:
        with pytest.raises(InfeasibleError, match="sparsity"):
            pruner_of(context).plan(config(0.95, metric))


def test_a_choice_without_scores_takes_no_rule_that_compares_them() -> None:
    with pytest.raises(ValueError, match="a rule that needs no scores with the metric nae"):
        config(0.5, "nae", allocation="global")
    assert config(0.5, "nae", repair="ream")["repair"] == "ream"


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="a mixture of experts for a recipe of experts, got llama"):
        pruner_of(context_of(small_llama(vocab_size=VOCABULARY), tmp_path)).plan(config())
    with pytest.raises(UsageError, match="a mixture of experts for a recipe of experts, got llama"):
        app.prune(known_recipe("reap", 0.25), "tiny", tmp_path / "out")


def test_whole_blocks_of_a_mixture_are_dropped(tmp_path: Path) -> None:
    model = make_mixture("mixtral", num_hidden_layers=4)
    pruner, dense = pruner_of(context_of(model, tmp_path), "blocks"), logits(model)
    wanted = config(0.25, "last", "blocks")
    plan = pruner.plan(wanted)
    assert plan is not None
    assert [kept.ffn for kept in plan.kept] == [6, 6, 6, 0]
    for block, key in enumerate(pruner.keys(wanted)):
        pruner.apply(block, key)
    three = make_mixture("mixtral", num_hidden_layers=4)
    three.model.layers = three.model.layers[:3]
    three.config.num_hidden_layers = 3
    torch.testing.assert_close(logits(model), logits(three))
    pruner.restore()
    assert torch.equal(logits(model), dense)


def test_one_command_prunes_the_experts_of_a_mixture(tmp_path: Path) -> None:
    app.prune(known_recipe("reap", 0.25), "tiny-moe", tmp_path / "out", tokens=512, window=256)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["MixtralForCausalLM"]  # a stock class
    assert (written["num_local_experts"], written["num_experts_per_tok"]) == (6, 2)
    manifest = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert manifest["kept"] == [{"kv_groups": 2, "ffn": 6}] * 6
    assert manifest["checks"]["greedy_gap"] == 0


def test_a_search_mixes_importances_rules_and_merging(tmp_path: Path) -> None:
    settings = settings_from(
        {
            "model": "tiny-moe",
            "space": {"kind": "recipe", "unit": "experts", "target": 0.25, "pool_tokens": 2048}
            | {"samples": [4], "length": [128], "choose": ["random"], "subsets": 1},
            "controller": {"kind": "random"},
            "evaluator": {"fidelities": [256], "window": 128, "calibration_tokens": 512, "test_tokens": 256},
            "budget": {"tokens": 9 * 256},
            "executor": {"kind": "local", "threads": 1},
        }
    )
    app.search(settings, tmp_path / "run")
    run = app.open_run(tmp_path / "run")
    trials = run.study.trials
    assert {"reap@0.25", "frequency@0.25", "easy_ep@0.25"} < set(run.baselines)
    forms = [t.measurement.candidate for t in trials if t.measurement.candidate.startswith("recipe: experts")]
    assert len({form.partition("| metric")[2] for form in forms}) > 3
    measured = [t.measurement.values["sparsity"] for t in trials if t.measurement.candidate in forms]
    assert measured == pytest.approx([0.25] * len(measured), abs=0.011)  # half of an expert of 48
