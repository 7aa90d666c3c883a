"""Allocation that a file says."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import BudgetError, Entry, Layer, RuleEvidence
from secateur.pruners.recipes.allocation.profile import read_profile
from tests.calls import few_calls
from tests.recipe_layers import linears, shares, sublayers


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
    evidence = RuleEvidence(profile=read_profile(write(tmp_path, lines)))
    assert allocate("profile", layers, evidence, 0.5625) == (1, 16, 3, 24)
    half = allocate("profile", layers, evidence, 0.5625 / 2)  # all by one factor
    assert shares(layers, half)[1::2] == pytest.approx([0.25, 0.375], abs=0.1)


def test_the_line_that_says_most_counts(tmp_path):
    lines = [{"linear": "layers.0.mlp", "sparsity": 0.1}, {"block": 0, "sparsity": 0.5}]
    evidence = RuleEvidence(profile=read_profile(write(tmp_path, lines)))
    layers = linears(1, (1000, 1000))
    assert allocate("profile", layers, evidence, 0.3) == (500, 100)


def test_what_pick_prints_is_a_profile(tmp_path):
    picked = {"number": 3, "sparsity_of": {"q": 0.2, "o": 0.4, "down": 0.5, "lm_head": 1e-05}}
    profile = read_profile(write(tmp_path, picked))
    assert profile[-1] == Entry(None, None, "lm_head", 1e-05)
    evidence = RuleEvidence(profile=profile[:-1])
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
    evidence, total = RuleEvidence(profile=read_profile(path)), sum(layer.n_weights for layer in layers)
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
    broken, deep = tmp_path / "broken.yaml", tmp_path / "deep.json"
    broken.write_text("- {block: 1")
    deep.write_text("[" * 100_000)
    for path in (tmp_path / "none.yaml", broken, deep, tmp_path):
        with pytest.raises(ValueError, match="Expected `profile` to be a YAML or JSON file, got") as raised:
            read_profile(path)
        assert str(path) in str(raised.value)


HOSTILE = {
    "an alias bomb": "a: &a [x, x, x, x, x, x, x, x]\n"
    + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in pairwise("abcdefgh")),
    "many levels": "[" * 3000,
    "levels of JSON": "[" * 100_000 + "]" * 100_000,
    "a tag": "- !!python/object/apply:os.system [id]",
    "a long number": "- {block: " + "9" * 5000 + "}",
    "too many bytes": "- {block: 1}\n" * 100_000,
    "other bytes": "- {block: \udcff}",
    "NaN": '[{"block": 0, "sparsity": NaN}]',
    "a list as a kind": "- {block: 0, kind: [mlp]}",
    "a long text": "- {linear: {" + "x" * 100_000 + ": 1}}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_profile_is_refused_at_once_in_one_short_line(tmp_path, kind):
    path = tmp_path / "p.yaml"
    path.write_bytes(HOSTILE[kind].encode(errors="surrogateescape"))
    with few_calls(), pytest.raises(ValueError, match="Expected") as raised:
        read_profile(path)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)
