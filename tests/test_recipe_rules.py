from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pruners.recipes.allocation.adapt import adapt_shares
from secateur.pruners.recipes.allocation.allocate import allocate, check_rule, defaults, rules_for
from secateur.pruners.recipes.allocation.cfsp import cfsp_keeps
from secateur.pruners.recipes.allocation.layers import BudgetError, Entry, Layer, RuleEvidence
from secateur.pruners.recipes.allocation.threshold import NORMALISATIONS
from secateur.spaces.methods import RULES
from tests.recipe_layers import evidence_of, linears, removed, shares, sublayers, wanted

STRUCTURE, WEIGHTS = rules_for("structure"), rules_for("weights")


# --- every rule ---


@pytest.mark.parametrize("rule", STRUCTURE)
@settings(max_examples=30)
@given(
    sparsity=st.floats(0, 1),
    n_blocks=st.integers(1, 7),
    groups=st.integers(1, 5),
    channels=st.integers(1, 40),
    group=st.integers(2, 300),
    channel=st.integers(2, 20),
    rest=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_budgets_of_units_are_met_to_within_one(
    rule, sparsity, n_blocks, groups, channels, group, channel, rest, seed
):
    layers = sublayers(n_blocks, groups, channels, group, channel, rest, seed)
    try:
        gone = allocate(rule, layers, evidence_of(layers, seed), sparsity)
    except BudgetError:
        return
    assert all(0 <= n <= layer.n_units for n, layer in zip(gone, layers, strict=True))
    assert gone[0] < layers[0].n_units  # the first attention keeps a group
    miss = abs(removed(layers, gone) - wanted(layers, sparsity))
    assert miss <= max(group, channel) + rest
    if (
        channel <= group
        and any(n + 1 < channels for n in gone[1::2])
        and rule in {"uniform", "global", "flap"}
    ):
        assert 2 * miss <= channel  # a channel more or less is not nearer


@pytest.mark.parametrize("rule", WEIGHTS)
@settings(max_examples=30)
@given(
    sparsity=st.floats(0, 1),
    n_blocks=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    n_scores=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_budgets_of_weights_are_met_exactly(rule, sparsity, n_blocks, sizes, n_scores, seed):
    layers = linears(n_blocks, sizes, n_scores, seed)
    try:
        gone = allocate(rule, layers, evidence_of(layers, seed), sparsity)
    except BudgetError:
        return
    assert all(0 <= n <= layer.n_units for n, layer in zip(gone, layers, strict=True))
    assert abs(sum(gone) - wanted(layers, sparsity)) <= 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_no_rule_gives_up_at_sparsities_that_people_use(rule, sparsity):
    layers = sublayers(8) if rule in STRUCTURE else linears(8)
    gone = allocate(rule, layers, evidence_of(layers), sparsity)
    assert abs(removed(layers, gone) - wanted(layers, sparsity)) <= 3


@pytest.mark.parametrize("rule", STRUCTURE)
def test_protected_layers_stay_whole_and_count_in_the_budget(rule):
    layers = sublayers()
    layers[2:4] = [replace(layer, keep=layer.n_units) for layer in layers[2:4]]
    gone = allocate(rule, layers, evidence_of(layers), 0.3)
    assert gone[2:4] == (0, 0)
    assert abs(removed(layers, gone) - wanted(layers, 0.3)) <= 3


@pytest.mark.parametrize("rule", [*STRUCTURE, "owl"])
def test_more_than_may_go_is_an_error_that_says_how_much(rule):
    layers = sublayers(2) if rule in STRUCTURE else linears(2)
    layers[1:] = [replace(layer, keep=layer.n_units) for layer in layers[1:]]
    with pytest.raises(BudgetError, match=r"Expected `sparsity` <= 0\.\d+.*got 0\.9"):
        allocate(rule, layers, evidence_of(layers), 0.9)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_goes_at_sparsity_0(rule):
    layers = sublayers() if rule in STRUCTURE else linears()
    assert set(allocate(rule, layers, evidence_of(layers), 0.0)) == {0}


@pytest.mark.parametrize("normalise", sorted({*NORMALISATIONS} - {"l2"}))
@settings(max_examples=30)
@given(sparsity=st.floats(0, 0.7), score=st.floats(0.001, 1000))
def test_equal_scores_give_equal_shares(normalise, sparsity, score):
    layers = [replace(layer, scores=np.full(layer.n_units, score)) for layer in sublayers()]
    even = allocate("uniform", layers, RuleEvidence(), sparsity)
    assert allocate("global", layers, RuleEvidence(), sparsity, normalise=normalise) == even
    flat = RuleEvidence(flap=tuple(np.zeros(layer.n_units) for layer in layers))
    assert allocate("flap", layers, flat, sparsity) == even


@settings(max_examples=30)
@given(sparsity=st.floats(0, 0.9), value=st.floats(0.001, 0.9))
def test_equal_evidence_gives_equal_shares(sparsity, value):
    layers = linears()
    n = len(layers)
    flat = RuleEvidence(
        (value,) * 3, outliers=(value,) * n, profile=tuple(Entry(b, None, None, value) for b in range(3))
    )
    even = allocate("uniform", layers, flat, sparsity)
    assert allocate("cfsp", layers, flat, sparsity, sublayers="both") == even
    for rule in ("adapt", "owl", "profile"):
        assert allocate(rule, layers, flat, sparsity) == even


# --- uniform ---


def test_shares_of_few_groups_are_rounded_so_that_their_mean_is_right():
    layers = sublayers(30, 3, 1536, 294_912, 1728, 576)
    gone = allocate("uniform", layers, RuleEvidence(), 0.2)
    assert sum(gone[::2]) == 18  # of 90: not 30 and not 0
    assert max(gone[::2]) == 1
    assert max(len(run) for run in "".join(map(str, gone[::2])).split("0")) <= 2  # nowhere in a row
    assert set(shares(layers, gone)[1::2]) <= {307 / 1536, 308 / 1536}


def test_first_and_last_blocks_are_left_alone_as_in_llm_pruner():
    layers = sublayers(32)
    gone = allocate("uniform", layers, RuleEvidence(), 0.2, skip_first=0.125, skip_last=0.0625)
    touched = {layer.block for layer, n in zip(layers, gone, strict=True) if n}
    assert touched == set(range(4, 30))
    assert np.mean(shares(layers, gone)[8:60]) == pytest.approx(0.2 * 32 / 26, abs=0.01)


# --- influence ---


def test_golden_cfsp():
    """The card's formula with sums over 128 x 1024 tokens."""
    angles, sparsity = np.array([0.10, 0.02, 0.03, 0.09]), 0.3
    sums = angles * 128 * 1024
    t = 1 / (1 + np.exp(-(sums - sums.mean()) / 1e4))
    expected = (1 - sparsity) * t / t.mean()
    assert expected.max() < 1
    assert cfsp_keeps(angles, np.ones(4), sparsity, 1.0) == pytest.approx(expected)
    layers = sublayers(4, channels=1000)
    influence = tuple(1 - np.cos(angles * math.pi))
    gone = allocate("cfsp", layers, RuleEvidence(influence=influence), 0.3, sublayers="both")
    assert [1 - x for x in shares(layers, gone)[1::2]] == pytest.approx(expected, abs=0.02)


def test_cfsp_shrinks_deviations_where_a_block_would_keep_more_than_it_has():
    angles, sparsity = np.array([0.9, 0.1, 0.1, 0.1]), 0.1
    t = 1 / (1 + np.exp(-13.1072 * (angles - 0.3)))
    assert (1 - sparsity) * t.max() / t.mean() >= 1
    factor = t.mean() * (1 / 0.9 - 1) / (t.max() - t.mean()) / 1.05
    expected = 0.9 * (t.mean() + factor * (t - t.mean())) / t.mean()
    found = cfsp_keeps(angles, np.ones(4), sparsity, 1.0)
    assert found == pytest.approx(expected)
    assert found.max() == pytest.approx(0.9 + 0.1 / 1.05)
    assert found.mean() == pytest.approx(0.9)


def test_cfsp_leaves_attentions_whole_as_published():
    layers = sublayers()
    evidence = RuleEvidence(influence=(0.4, 0.1, 0.2, 0.3))
    gone = allocate("cfsp", layers, evidence, 0.3)
    assert set(gone[::2]) == {0}
    assert gone[3] > gone[5] > gone[7] > gone[1]
    assert removed(layers, gone) == pytest.approx(wanted(layers, 0.3), abs=3)


def test_golden_adapt():
    """S <- clip(S + 0.02 - 0.02 I, 0, 0.99) with I = 1, 0, -1 grows by 0, 0.02, 0.04: clipped in the 25th step."""
    layers = [Layer(block, "mlp", 2, 1000) for block in range(3)]
    relative = np.array([1.0, 0.0, -1.0])
    assert adapt_shares(relative, layers, 0.3, 0.02) == pytest.approx([0.0, 0.3, 0.6])
    assert adapt_shares(relative, layers, 0.5, 0.02) == pytest.approx([0.0, 0.51, 0.99])
    # a larger rate: the first block's 0.02 - 0.04 stays at 0
    assert adapt_shares(relative, layers, 0.2, 0.04) == pytest.approx([0.0, 0.15, 0.45])
    gone = allocate("adapt", layers, RuleEvidence(influence=(0.3, 0.2, 0.1)), 0.3)
    assert gone == (0, 300, 600)


# --- outliers ---


def test_golden_owl():
    """Shares of outliers 1, 2, 6 % with mean 3: deviations -2, -1, 3 over 3 times 0.08."""
    layers = [Layer(block, "mlp", 1, 3000) for block in range(3)]
    gone = allocate("owl", layers, RuleEvidence(outliers=(0.01, 0.02, 0.06)), 0.7)
    assert gone == (round(3000 * (0.7 + 0.16 / 3)), round(3000 * (0.7 + 0.08 / 3)), round(3000 * 0.62))
    assert sum(gone) == 6300


@settings(max_examples=30)
@given(
    outliers=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    sparsity=st.floats(0.2, 0.8),
    spread=st.floats(0.0, 0.2),
)
def test_owl_stays_within_its_spread(outliers, sparsity, spread):
    layers = linears()
    gone = allocate("owl", layers, RuleEvidence(outliers=tuple(outliers)), sparsity, spread=spread)
    assert all(abs(share - sparsity) <= spread + 2e-3 for share in shares(layers, gone))


# --- wrong use ---

WRONG = {
    "unknown": ("unifrom", {}, "got 'unifrom'. Did you mean 'uniform'?"),
    "another unit": ("owl", {}, "spreads structure, got owl. Take one of uniform, global"),
    "unknown parameter": ("nirvana", {"gama": 1.0}, "got `gama`. Did you mean 'gamma'?"),
    "too large": ("adapt", {"rate": 3.0}, "`rate` to be a number from 0 to 1, got 3.0 at the rule adapt"),
    "no number": ("adapt", {"rate": "fast"}, "got 'fast'"),
    "no option": ("global", {"normalise": "rank"}, "one of none, mean, max, zscore, l2, mask, got 'rank'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_named(case):
    rule, parameters, message = WRONG[case]
    with pytest.raises(ValueError) as raised:
        check_rule(rule, "structure", parameters)
    assert message in str(raised.value)


MISSING = {
    "global": ("scores", "`scores` of 8 for the rule global, got 0"),
    "flap": ("flap", "`flap` of 8 for the rule flap, got 0"),
    "adapt": ("influence", "`influence` of 4 for the rule adapt, got 0"),
    "profile": ("profile", "`profile` of 1 for the rule profile, got 0"),
}


@pytest.mark.parametrize("rule", MISSING)
def test_missing_evidence_is_named(rule):
    need, message = MISSING[rule]
    assert RULES[rule].evidence == (need,)
    with pytest.raises(ValueError, match=message):
        allocate(rule, [replace(layer, scores=np.zeros(0)) for layer in sublayers()], RuleEvidence(), 0.2)


def test_profiles_that_fit_another_model_are_named():
    layers = sublayers()
    lines = tuple(Entry(block, None, None, 0.2) for block in range(4))
    with pytest.raises(
        ValueError, match=r"about a layer of the model, got block 9, sparsity 0.2.*named block0.attention"
    ):
        allocate("profile", layers, RuleEvidence(profile=(*lines, Entry(9, None, None, 0.2))), 0.2)
    with pytest.raises(
        ValueError, match=r"a line of `profile` for each layer, got none for block3.attention"
    ):
        allocate("profile", layers, RuleEvidence(profile=lines[:3]), 0.2)
    with pytest.raises(ValueError, match="`sparsity` in each line"):
        allocate("profile", layers, RuleEvidence(profile=(*lines[:3], Entry(3))), 0.2)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match=r"`sparsity` within \[0, 1\], got 20"):
        allocate("uniform", sublayers(), RuleEvidence(), 20.0)
    with pytest.raises(ValueError, match="NaN or infinity at block1"):
        Layer(1, "mlp", 2, 3, np.array([1.0, np.nan, 2.0]))
    with pytest.raises(ValueError, match="`keep` from 0 to 3, got 4"):
        Layer(1, "mlp", 2, 3, keep=4)
    with pytest.raises(ValueError, match=">= 1, got 0, 3"):
        Layer(1, "mlp", 0, 3)


# --- the registry ---


@pytest.mark.parametrize("rule", RULES)
def test_rows_are_complete(rule):
    row = RULES[rule]
    assert row.paper.startswith("https://")
    assert row.summary
    check_rule(rule, next(iter(row.units)), defaults(rule))
    for knob in row.parameters:
        for option in knob.options:
            knob.check(option, rule)
        assert knob.default in knob.options
        if not isinstance(knob.default, str):
            assert list(knob.options) == sorted(set(knob.options))
