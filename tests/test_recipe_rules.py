from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.spaces.budget import n_zeros
from secateur.spaces.recipe.layers import BudgetError, Entry, Evidence, Layer
from secateur.spaces.recipe.profiles import read_profile
from secateur.spaces.recipe.rules import RULES, allocate, check_rule, defaults, rules_for
from secateur.spaces.recipe.shares import adapt_shares, cfsp_keeps
from secateur.spaces.recipe.thresholds import NORMALISATIONS

STRUCTURE, WEIGHTS = rules_for("structure"), rules_for("weights")


def sublayers(n_blocks=4, groups=4, channels=32, group=40, channel=6, rest=2, seed=0):
    """Blocks of an attention and an MLP, with scores of two scales."""
    rng = np.random.default_rng(seed)
    found = []
    for block in range(n_blocks):
        found.append(Layer(block, "attention", group, groups, rng.gamma(2, 100, groups), rest=rest))
        found.append(Layer(block, "mlp", channel, channels, rng.gamma(2, 1, channels), rest=rest))
    return found


def linears(n_blocks=3, sizes=(4000, 9000), n_scores=200, seed=0):
    """An attention's and an MLP's linear in each block, with a sample of their scores."""
    rng = np.random.default_rng(seed)
    return [
        Layer(block, kind, 1, size, rng.gamma(2, 1 + block, n_scores), name=f"layers.{block}.{kind}")
        for block in range(n_blocks)
        for kind, size in zip(("attention", "mlp"), sizes, strict=True)
    ]


def evidence_of(layers, seed=0):
    """All that rules ask for."""
    rng = np.random.default_rng(seed)
    n_blocks = max(layer.block for layer in layers) + 1
    return Evidence(
        influence=tuple(rng.uniform(0.01, 0.4, n_blocks)),
        flap=tuple(rng.normal(size=layer.n_units) for layer in layers if layer.size > 1),
        outliers=tuple(rng.uniform(0, 0.1, len(layers))),
        profile=tuple(
            Entry(block, None, None, share) for block, share in enumerate(rng.uniform(0.1, 1, n_blocks))
        ),
    )


def removed(layers, gone):
    return sum(layer.removed(n) for layer, n in zip(layers, gone, strict=True))


def wanted(layers, sparsity):
    return n_zeros(sparsity, sum(layer.n_weights for layer in layers))


def shares(layers, gone):
    return [n / layer.n_units for layer, n in zip(layers, gone, strict=True)]


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
    even = allocate("uniform", layers, Evidence(), sparsity)
    assert allocate("global", layers, Evidence(), sparsity, normalise=normalise) == even
    flat = Evidence(flap=tuple(np.zeros(layer.n_units) for layer in layers))
    assert allocate("flap", layers, flat, sparsity) == even


@settings(max_examples=30)
@given(sparsity=st.floats(0, 0.9), value=st.floats(0.001, 0.9))
def test_equal_evidence_gives_equal_shares(sparsity, value):
    layers = linears()
    n = len(layers)
    flat = Evidence(
        (value,) * 3, outliers=(value,) * n, profile=tuple(Entry(b, None, None, value) for b in range(3))
    )
    even = allocate("uniform", layers, flat, sparsity)
    assert allocate("cfsp", layers, flat, sparsity, sublayers="both") == even
    for rule in ("adapt", "owl", "profile"):
        assert allocate(rule, layers, flat, sparsity) == even


# --- uniform ---


def test_shares_of_few_groups_are_rounded_so_that_their_mean_is_right():
    layers = sublayers(30, 3, 1536, 294_912, 1728, 576)
    gone = allocate("uniform", layers, Evidence(), 0.2)
    assert sum(gone[::2]) == 18  # of 90: not 30 and not 0
    assert max(gone[::2]) == 1
    assert max(len(run) for run in "".join(map(str, gone[::2])).split("0")) <= 2  # nowhere in a row
    assert set(shares(layers, gone)[1::2]) <= {307 / 1536, 308 / 1536}


def test_first_and_last_blocks_are_left_alone_as_in_llm_pruner():
    layers = sublayers(32)
    gone = allocate("uniform", layers, Evidence(), 0.2, skip_first=0.125, skip_last=0.0625)
    touched = {layer.block for layer, n in zip(layers, gone, strict=True) if n}
    assert touched == set(range(4, 30))
    assert np.mean(shares(layers, gone)[8:60]) == pytest.approx(0.2 * 32 / 26, abs=0.01)


# --- thresholds ---


def one_by_one(layers, rows, target):
    """Removes what scores least, one after the other, as long as it fits."""
    units = sorted((float(score), i) for i, row in enumerate(rows) for score in row)
    gone, left = [0] * len(layers), target
    skipped = set()
    for _, i in units:
        if i in skipped or gone[i] == layers[i].n_free:
            continue
        cost = layers[i].removed(gone[i] + 1) - layers[i].removed(gone[i])
        if cost > left:
            skipped.add(i)
        else:
            gone[i], left = gone[i] + 1, left - cost
    return gone, left


@settings(max_examples=30)
@given(sparsity=st.floats(0, 0.8), cost=st.sampled_from([-1.0, 0.0, 1.0]), seed=st.integers(0, 50))
def test_one_threshold_removes_what_scores_least(sparsity, cost, seed):
    layers = [replace(layer, keep=1) for layer in sublayers(seed=seed, rest=0)]
    rows = [layer.scores * (layer.size / 6) ** cost for layer in layers]
    expected, left = one_by_one(layers, rows, wanted(layers, sparsity))
    gone = allocate("global", layers, Evidence(), sparsity, cost=cost)
    one_more = {layer.size for layer, n in zip(layers, expected, strict=True) if n < layer.n_free}
    nearer = left > 0 and 2 * left >= min(one_more, default=math.inf)
    assert np.subtract(gone, expected).sum() == np.abs(np.subtract(gone, expected)).sum() == nearer


def test_scores_are_comparable_behind_a_normalisation():
    layers = [
        Layer(1, "mlp", 2, 4, np.array([1.0, 2.0, 3.0, 4.0])),
        Layer(2, "mlp", 2, 4, np.array([10.0, 10.0, 10.0, 50.0])),
    ]
    by = {
        name: allocate("global", layers, Evidence(), 0.25, normalise=name) for name in ("none", "mean", "max")
    }
    # means 2.5 and 20: 0.4, 0.8, 1.2, 1.6 and 0.5, 0.5, 0.5, 2.5; largest 4 and 50: 0.25, 0.5 ... and 0.2 three times
    assert by == {"none": (2, 0), "mean": (1, 1), "max": (0, 2)}
    # standardised -1.34, -0.45, ... and -0.58 three times; over the length 5.48 and 52.9: 0.18, 0.37 ... and 0.19
    for name in ("zscore", "l2"):
        assert allocate("global", layers, Evidence(), 0.25, normalise=name) == (1, 1)


@pytest.mark.parametrize("cost", [-1.0, 0.5, 1.0])
@pytest.mark.parametrize("normalise", ["none", "zscore"])
def test_a_cost_protects_large_units_whatever_the_sign_of_scores(normalise, cost):
    scores = np.random.default_rng(0).lognormal(size=72) - 100 * (normalise == "none")
    layers = [Layer(0, "attention", 10, 8, scores[:8]), Layer(0, "mlp", 5, 64, scores[8:])]
    large = [allocate("global", layers, Evidence(), 0.3, normalise=normalise, cost=c)[0] for c in (0, cost)]
    assert (large[1] < large[0]) if cost > 0 else (large[1] > large[0])


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_numerical_prunings_masks_are_pooled_as_published(sparsity):
    rng = np.random.default_rng(1)
    alpha, n_units, width = 16, (6, 64), (8, 1)
    layers, masks = [], []
    for block in range(3):
        for kind, n, columns in zip(("attention", "mlp"), n_units, width, strict=True):
            size = n * columns
            x = rng.normal(size=(200, size)) * 10.0**block  # energies of blocks are far apart
            a = x.T @ x / len(x)
            penalty, r = 1e9 * a.trace(), (1 - sparsity) * size
            z = np.linalg.solve(a + penalty, a.sum(1) + penalty * r)
            u = np.linalg.solve(a, np.ones(size)).reshape(n, columns).mean(1)
            masks.append(z.reshape(n, columns).mean(1) * (alpha if kind == "attention" else 1))
            layers.append(Layer(block, kind, alpha if kind == "attention" else 1, n, -u))
    gone = allocate("global", layers, Evidence(), sparsity, normalise="mask", cost=1)
    threshold = max(np.sort(mask)[n - 1] for mask, n in zip(masks, gone, strict=True) if n)
    assert all(
        np.sort(mask)[n] >= threshold - 1e-6 for mask, n in zip(masks, gone, strict=True) if n < len(mask)
    )
    assert min(gone[1::2]) > 0, "no block's scale decides"


@settings(max_examples=30)
@given(sparsity=st.floats(0, 1), seed=st.integers(0, 50))
def test_samples_that_are_all_scores_give_the_exact_threshold(sparsity, seed):
    rng = np.random.default_rng(seed)
    layers = [Layer(0, kind, 1, n, rng.normal(size=n)) for kind, n in (("attention", 300), ("mlp", 500))]
    exact = allocate("global", layers, Evidence(), sparsity)
    lowest = np.sort(np.concatenate([layer.scores for layer in layers]))[: sum(exact)]
    assert exact == tuple(int((layer.scores <= lowest[-1]).sum()) if lowest.size else 0 for layer in layers)
    repeated = [
        replace(layer, n_units=10 * layer.n_units) for layer in layers
    ]  # each score stands for ten weights
    tenfold = allocate("global", repeated, Evidence(), sparsity)
    assert np.abs(np.subtract(tenfold, np.multiply(exact, 10))).max() <= 10


def test_golden_flap():
    """By hand: of 2 x (2 groups of 4 weights, 4 channels of 1.. here 2): 24 weights, a third is 8 of them."""
    layers = sublayers(2, 2, 4, group=4, channel=2, rest=0)
    flap = tuple(map(np.array, ([9.0, 9.0], [-1.5, 0.3, 0.5, 0.7], [-0.4, 0.4], [-1.7, -0.1, 0.8, 1.0])))
    # ascending: -1.7 (2), -1.5 (2), -0.4 (4) = 8; a group counts for two channels
    assert allocate("flap", layers, Evidence(flap=flap), 1 / 4) == (0, 1, 1, 1)
    assert allocate("flap", layers, Evidence(flap=flap), 1 / 8) == (0, 1, 0, 1)
    # 6 weights: the group does not fit, the next channel does
    assert allocate("flap", layers, Evidence(flap=flap), 6 / 32) == (0, 1, 0, 2)


def test_golden_nirvana_of_llama_3_1_8b_at_one_half():
    """Card: gamma 3.36, 32 blocks of 8 KV groups with 4 query heads of 128, 14336 channels: 17.2 % and 57.8 %."""
    width, group, channel = 4096, 2 * 128 * (4 + 1), 3
    layers = sublayers(32, 8, 14336, group * width, channel * width, rest=0)
    gone = allocate("nirvana", layers, Evidence(), 0.5)
    assert sum(gone[::2]) / (32 * 8) == pytest.approx(0.172, abs=0.002)
    assert sum(gone[1::2]) / (32 * 14336) == pytest.approx(0.578, abs=0.0005)
    assert all(n < layer.n_units for n, layer in zip(gone, layers, strict=True))
    attention = np.concatenate([layer.scores for layer in layers[::2]])
    threshold = np.sort(attention)[sum(gone[::2]) - 1]
    assert gone[::2] == tuple(int((layer.scores <= threshold).sum()) for layer in layers[::2])


def test_attentions_lose_the_rest_where_gamma_asks_too_much_of_mlps():
    layers = sublayers()
    gone = allocate("nirvana", layers, Evidence(), 0.7, gamma=50.0)
    assert gone[1::2] == (31,) * 4  # all but one
    assert sum(gone[::2]) > 0


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
    gone = allocate("cfsp", layers, Evidence(influence=influence), 0.3, sublayers="both")
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
    evidence = Evidence(influence=(0.4, 0.1, 0.2, 0.3))
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
    gone = allocate("adapt", layers, Evidence(influence=(0.3, 0.2, 0.1)), 0.3)
    assert gone == (0, 300, 600)


# --- outliers ---


def test_golden_owl():
    """Shares of outliers 1, 2, 6 % with mean 3: deviations -2, -1, 3 over 3 times 0.08."""
    layers = [Layer(block, "mlp", 1, 3000) for block in range(3)]
    gone = allocate("owl", layers, Evidence(outliers=(0.01, 0.02, 0.06)), 0.7)
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
    gone = allocate("owl", layers, Evidence(outliers=tuple(outliers)), sparsity, spread=spread)
    assert all(abs(share - sparsity) <= spread + 2e-3 for share in shares(layers, gone))


# --- files ---


def write(tmp_path, lines):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(lines))
    return path


def test_a_profile_gives_its_shares(tmp_path):
    lines = [
        {"block": 0, "sparsity": 0.25},
        {"block": 0, "kind": "mlp", "sparsity": 0.5},
        {"block": 1, "sparsity": 0.75},
    ]
    layers = sublayers(2, group=48, rest=0)
    evidence = Evidence(profile=read_profile(write(tmp_path, lines)))
    assert allocate("profile", layers, evidence, 0.5625) == (1, 16, 3, 24)
    half = allocate("profile", layers, evidence, 0.5625 / 2)  # all by one factor
    assert shares(layers, half)[1::2] == pytest.approx([0.25, 0.375], abs=0.1)


def test_the_line_that_says_most_counts(tmp_path):
    lines = [{"linear": "layers.0.mlp", "sparsity": 0.1}, {"block": 0, "sparsity": 0.5}]
    evidence = Evidence(profile=read_profile(write(tmp_path, lines)))
    layers = linears(1, (1000, 1000))
    assert allocate("profile", layers, evidence, 0.3) == (500, 100)


def test_what_pick_prints_is_a_profile(tmp_path):
    picked = {"number": 3, "sparsity_of": {"q": 0.2, "o": 0.4, "down": 0.5, "lm_head": 1e-05}}
    profile = read_profile(write(tmp_path, picked))
    assert profile[-1] == Entry(None, None, "lm_head", 1e-05)
    evidence = Evidence(profile=profile[:-1])
    layers = [
        Layer(1, "attention", 8, 100, linears=("q", "o")),
        Layer(1, "mlp", 4, 200, linears=("down",)),
    ]
    assert allocate("profile", layers, evidence, 0.4) == (30, 100)
    parts = [Layer(0, "attention", 1, 50, name=name) for name in "qo"]
    parts.append(Layer(0, "mlp", 1, 100, name="down"))
    assert allocate("profile", parts, evidence, 0.4) == (10, 20, 50)


def test_a_prefix_removes_whole_sub_layers_and_a_part_of_the_next(tmp_path):
    path = tmp_path / "order.yaml"
    path.write_text("- {block: 2, kind: attention}\n- {block: 1, kind: mlp}\n- {block: 3, kind: attention}\n")
    layers = sublayers(rest=0)  # attentions of 160 weights, MLPs of 192
    evidence, total = Evidence(profile=read_profile(path)), sum(layer.n_weights for layer in layers)
    assert allocate("prefix", layers, evidence, 160 / total) == (0, 0, 0, 0, 4, 0, 0, 0)
    assert allocate("prefix", layers, evidence, (160 + 60) / total) == (0, 0, 0, 10, 4, 0, 0, 0)
    assert allocate("prefix", layers, evidence, (160 + 192 + 80) / total) == (0, 0, 0, 32, 4, 0, 2, 0)
    with pytest.raises(BudgetError, match="all that the rule may remove"):
        allocate("prefix", layers, evidence, 0.5)


BAD_LINES = {
    "a mapping": ({"block": 0, "sparsity": 3}, r"within \[0, 1\], got 3 at line 2"),
    "no lines": ({"sparsity_of": 0.3}, "hold a list.*secateur pick RUN --json"),
    "nothing": ([], "hold a list"),
    "no mapping": ([3], r"keys out of block, kind, linear, sparsity, got 3 at line 1"),
    "unknown key": ([{"block": 0, "sparsty": 0.1}], "got .*sparsty.* at line 1"),
    "no block": ([{"kind": "mlp"}], "`block` to be an index from 0 on, got None at line 1"),
    "negative block": ([{"block": -1}], "got -1"),
    "unknown kind": ([{"block": 0, "kind": "ffn"}], "`kind` to be attention or mlp, got 'ffn'"),
    "no name": ([{"linear": 3}], "`linear` to be the name"),
    "more than all": ([{"block": 0}, {"block": 1, "sparsity": 60}], r"within \[0, 1\], got 60 at line 2"),
    "true": ([{"block": 0, "sparsity": True}], "got True"),
    "twice": (
        [{"block": 0, "sparsity": 0.1}, {"block": 0, "sparsity": 0.2}],
        "once, got block 0, sparsity 0.2 again",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_profile_is_named(case, tmp_path):
    lines, message = BAD_LINES[case]
    with pytest.raises(ValueError, match=message):
        read_profile(write(tmp_path, lines))


def test_files_that_are_none_are_named(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("- {block: 1")
    for path in (tmp_path / "none.yaml", broken, tmp_path):
        with pytest.raises(ValueError, match="Expected `profile` to be a YAML or JSON file, got") as raised:
            read_profile(path)
        assert str(path) in str(raised.value)


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
    assert RULES[rule].needs == {need}
    with pytest.raises(ValueError, match=message):
        allocate(rule, [replace(layer, scores=np.zeros(0)) for layer in sublayers()], Evidence(), 0.2)


def test_profiles_that_fit_another_model_are_named():
    layers = sublayers()
    lines = tuple(Entry(block, None, None, 0.2) for block in range(4))
    with pytest.raises(
        ValueError, match=r"about a layer of the model, got block 9, sparsity 0.2.*named block0.attention"
    ):
        allocate("profile", layers, Evidence(profile=(*lines, Entry(9, None, None, 0.2))), 0.2)
    with pytest.raises(
        ValueError, match=r"a line of `profile` for each layer, got none for block3.attention"
    ):
        allocate("profile", layers, Evidence(profile=lines[:3]), 0.2)
    with pytest.raises(ValueError, match="`sparsity` in each line"):
        allocate("profile", layers, Evidence(profile=(*lines[:3], Entry(3))), 0.2)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match=r"`sparsity` within \[0, 1\], got 20"):
        allocate("uniform", sublayers(), Evidence(), 20)
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
    for knob in row.knobs:
        for option in knob.options:
            knob.check(option, rule)
        assert knob.default in knob.options
        if not isinstance(knob.default, str):
            assert list(knob.options) == sorted(set(knob.options))
