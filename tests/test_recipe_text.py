"""Recipes as text and as plain values, and what pruners know of them."""

from __future__ import annotations

import numpy as np
import pytest

from secateur.pruners.recipes.blend import Blend
from secateur.pruners.weights.method import Method
from secateur.spaces.method import UNITS
from secateur.spaces.methods import (
    CUT_REPAIRS,
    DEPTH,
    DEPTH_REPAIRS,
    EXPERT_IMPORTANCES,
    EXPERT_REPAIRS,
    IMPORTANCES,
    MASK_REPAIRS,
    METRICS,
    REPAIRS,
    STREAM_REPAIRS,
    UNIT_RECONSTRUCTIONS,
    UPDATES,
)
from secateur.spaces.recipe import keys
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.known import KNOWN
from tests.recipe_toy import recipe_space

PLAIN = {"unit": "structure", "sparsity": 0.2}
BLEND = {"name": "blend"}
START = {"structure": "wanda_sp", "weights": "wanda", "blocks": "shortgpt", "experts": "reap"}


def test_a_recipe_reads_as_a_line():
    recipe = Recipe.of(
        {
            **PLAIN,
            "calibration": {"sources": {"docs": 4, "code": 2}, "choose": "loss", "quantiles": (0.25, 0.75)},
            "metric": {"name": "blend", "order": "mixed", "angle": 0.3, "weights": {"q": 0.5}, "norm": "inf"},
            "allocation": {"rule": "nirvana"},
            "repair": "bias",
        }
    )
    assert recipe.text == (
        "recipe: structure 0.2 | calibration code:1,docs:2; samples=32; length=128; choose=loss; quantiles=0.25,0.75 | "
        "metric blend; order=mixed; angle=0.3; magnitude=1; activation=1; absolute=element; norm=inf; reduce=sum; "
        "weights=q:0.5,k:1,v:1,o:1,gate:1,up:1,down:1 | allocation nirvana; gamma=3.36 | repair bias"
    )
    assert Recipe.parse(recipe.text) == recipe
    assert recipe.plain == completed(recipe.plain)
    assert recipe.plain["calibration"]["sources"] == {"code": 1, "docs": 2}
    assert recipe.sparsity == 0.2


def test_equal_forms_have_equal_texts():
    short = {"unit": "weights", "sparsity": 0.5, "metric": "wanda", "allocation": "uniform"}
    whole = {**short, "metric": {"comparison": "output", "name": "wanda"}, "repair": "none"}
    more = {**whole, "calibration": {"samples": 32.0, "sources": {"calibration": 3, "other": 0}}}
    assert Recipe.of(short) == Recipe.of(whole) == Recipe.of(more)
    assert Recipe.of({**short, "metric": "formula: abs( W )*X"}) == Recipe.of(
        {**short, "metric": {"name": "formula: abs(W) * X"}}
    )


@pytest.mark.parametrize(
    "change",
    [
        ("recipe: structure 0.2", "recipe: structure 0.20"),
        ("samples=32", "samples=32.0"),
        ("samples=32; ", ""),
        ("samples=32; length=128", "length=128; samples=32"),
        ("repair none", "repair none; x=1"),
        (" | repair none", ""),
        ("wanda_sp", "wanda_sp; angle=0.5"),
        ("subset=0", "subset=0; subset=0"),
        ("docs:1", "docs:2"),
        ("docs:1", "docs"),
        ("sparsity", "dense"),
    ],
)
def test_only_canonical_texts_are_read(change):
    text = Recipe.of({**PLAIN, "calibration": {"sources": {"docs": 1}}}).text
    assert Recipe.parse(text).text == text
    changed = text.replace(*change) if change[0] in text else change[1] * 2
    with pytest.raises(ValueError, match="Expected"):
        Recipe.parse(changed)


def test_the_dense_model_has_no_plain_form():
    dense = Recipe.parse("dense")
    assert dense.is_dense
    assert dense.sparsity == 0
    with pytest.raises(ValueError, match="got 'dense', which has no plain form"):
        _ = dense.plain


WEIGHTS = {"unit": "weights", "sparsity": 0.5}


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({}, "Expected `unit` to be one of weights, structure, blocks, experts, got None"),
        ({"unit": "structure", "sparsity": 1.2}, r"`sparsity` within \(0, 1\), got 1.2"),
        ({"unit": "structure", "sparsity": True}, "`sparsity` within"),
        ({**PLAIN, "metrics": "flap"}, "got `metrics`.*Did you mean 'metric"),
        ({**PLAIN, "calibration": {"sample": 3}}, "Did you mean 'calibration.samples'"),
        ({**PLAIN, "calibration": 3}, "Expected `calibration` to hold keys, got 3"),
        ({**PLAIN, "calibration": {"samples": 0}}, "`calibration.samples` to be a whole number >= 1, got 0"),
        ({**PLAIN, "calibration": {"sources": {"docs": 0}}}, "one of them > 0"),
        ({**PLAIN, "calibration": {"choose": "loss", "quantiles": [0.5, 0.5]}}, "the first < the second"),
        ({**PLAIN, "calibration": {"choose": "clusters", "clusters": [8]}}, "clusters from 0 to 7"),
        ({**PLAIN, "calibration": {"quantiles": [0.1, 0.5]}}, "only where it applies.*choose` one of loss"),
        ({**PLAIN, "metric": {**BLEND, "magnitude": 3}}, r"`metric.magnitude` within \[0, 2\], got 3"),
        ({**PLAIN, "metric": {**BLEND, "order": "first", "angle": 0.1}}, "not first.*Remove it"),
        ({**PLAIN, "metric": {**BLEND, "magnitude": 0, "activation": 0}}, "all scores would be equal"),
        ({**PLAIN, "metric": {**BLEND, "weights": {"up": 0, "gate": 0, "down": 0}}}, "of gate, up, down > 0"),
        ({**PLAIN, "metric": {"name": "flap", "comparison": "layer"}}, "got `metric.comparison`"),
        ({**PLAIN, "metric": "llm_pruner_mixed", "calibration": {"gradients": "forward"}}, "only where"),
        (
            {**PLAIN, "metric": {**BLEND, "order": "mixed"}, "calibration": {"gradients": "forward"}},
            "`metric.order` one of first, not mixed",
        ),
        (
            {**PLAIN, "repair": "laco"},
            "`repair` to be one of none, bias, refit, obs, liar, admm, kprune, got 'laco'",
        ),
        ({**PLAIN, "allocation": "owl"}, "`allocation.rule` to be one of"),
        ({**PLAIN, "allocation": {"rule": "flap", "gamma": 2}}, "`allocation.rule` one of nirvana, not flap"),
        ({**WEIGHTS, "repair": "refit"}, "`repair` to be one of none, bias, obs, admm, got 'refit'"),
        ({**WEIGHTS, "metric": "sparsegpt", "repair": "obs"}, "repairs by itself, got 'obs'"),
        ({**WEIGHTS, "metric": "sparsegpt", "allocation": "global"}, "needs no scores .* got 'global'"),
        ({**WEIGHTS, "metric": "formula: abs(Q)"}, "Q"),
        ({"unit": "blocks", "sparsity": 0.5, "allocation": "uniform"}, "got `allocation.rule`"),
    ],
)
def test_contradictions_are_named(plain, message):
    with pytest.raises(ValueError, match=message):
        completed(plain)


def test_signed_gradients_may_be_estimated_forwards():
    for metric in ({**BLEND, "order": "first"}, {"name": "llm_pruner_vector"}):
        plain = {**PLAIN, "metric": metric, "calibration": {"gradients": "forward"}}
        assert "gradients=forward" in Recipe.of(plain).text


def test_names_agree_with_the_pruners():
    assert keys.signed_metrics() == ("llm_pruner_first", "llm_pruner_vector")
    assert not any("mean" in Method(name).gradients for name in METRICS)
    assert set(REPAIRS["weights"]) == set(MASK_REPAIRS)
    assert set(REPAIRS["structure"]) == {*CUT_REPAIRS, *STREAM_REPAIRS}
    assert set(REPAIRS["blocks"]) == set(DEPTH_REPAIRS)
    assert set(REPAIRS["experts"]) == set(EXPERT_REPAIRS) == {"none", "ream", "mc_smoe", "hc_smoe"}
    assert {unit: keys.first_metric(unit) for unit in UNITS} == START


@pytest.mark.parametrize("unit", UNITS)
def test_known_recipes_are_ones_that_can_be_carried_out(unit):
    known = {
        "structure": {*IMPORTANCES, *UNIT_RECONSTRUCTIONS, keys.BLEND},
        "weights": {**METRICS, **UPDATES},
        "blocks": {*DEPTH},
        "experts": {*EXPERT_IMPORTANCES},
    }
    rows = {name: row for name, row in KNOWN.items() if row.unit == unit}
    assert START[unit] in rows
    for name, row in rows.items():
        whole = completed({"unit": unit, "sparsity": 0.5, **row.form})
        metric = whole["metric"]["name"]
        assert metric in known[unit] or (metric.startswith("formula: ") and unit == "weights"), name
        assert row.summary
        assert row.paper.startswith("https://")
        assert "calibration" not in row.form


def test_every_sampled_blend_is_a_blend():
    for unit in ("weights", "structure"):
        space, rng = recipe_space(unit=unit, metrics=["blend"], search=["metric"]), np.random.default_rng(0)
        for _ in range(50):
            Blend.of(space.sample(rng, 0).plain["metric"])
