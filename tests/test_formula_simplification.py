"""Simplification keeps what a formula says, and where it says nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given

from secateur.spaces.formulas.grammar import parse, print_formula
from secateur.spaces.formulas.signs import facts_of
from secateur.spaces.formulas.simplify import RULES, simplify
from secateur.spaces.formulas.tree import (
    Apply,
    Terminal,
    Tree,
)
from tests.formula_values import seeds, tensors, trees, value


@given(trees)
def test_simplification_is_idempotent_and_never_larger(tree):
    simple = simplify(tree)
    assert simplify(simple) == simple
    assert simple.size <= tree.size
    assert simple.depth <= tree.depth


@given(trees, seeds)
def test_exact_rules_keep_every_bit_where_the_formula_is_defined(tree, seed):
    given = tensors(seed)
    before = value(tree, given)
    if before is not None:
        after = value(simplify(tree, tuple(rule for rule in RULES if rule.exact)), given)
        assert after is not None
        assert torch.equal(before, after)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.pattern)
def test_every_rule_keeps_values_and_domain(rule):
    """Each rule on arguments of every kind: where one side is defined so is the other, with the same values."""
    fill = [
        "W",
        "X",
        "G * W",
        "exp(W)",
        "neg(X)",
        "log(W)",
        "log(X)",
        "sqrt(W)",
        "minmax(W)",
        "W / P",
        "0.5",
        "-3",
    ]
    changed = 0
    for x, y in itertools.product(fill, fill[:8] if "y" in rule.pattern else ["W"]):
        parts = {"x": parse(x), "y": parse(y)}
        tree = _fill(parse(rule.pattern, terminals=("x", "y")), parts)
        result = simplify(tree, (rule,))
        changed += result != simplify(tree, ())
        before, after = value(tree, tensors(1)), value(result, tensors(1))
        assert (before is None) == (after is None), print_formula(tree)
        if before is not None:
            assert (
                torch.equal(before, after)
                if rule.exact
                else torch.allclose(before, after, rtol=1e-9, atol=1e-9)
            )
    assert changed


def _fill(tree: Tree, parts: dict[str, Tree]) -> Tree:
    if isinstance(tree, Apply):
        return Apply(tree.operator, tuple(_fill(x, parts) for x in tree.arguments))
    return parts.get(tree.name, tree) if isinstance(tree, Terminal) else tree


@given(trees, seeds)
def test_what_is_known_of_signs_holds(tree, seed):
    known, values = facts_of(tree), value(tree, tensors(seed))
    if values is not None:
        assert not known.nonnegative or (values >= 0).all()
        assert known.nonnegative or not known.positive


@pytest.mark.parametrize(
    ("text", "simple"),
    [
        ("exp(log(W))", "exp(log(W))"),  # undefined for negative weights, and stays so
        ("exp(log(exp(W)))", "exp(W)"),
        ("neg(neg(W))", "W"),
        ("square(sqrt(W))", "square(sqrt(W))"),
        ("square(sqrt(X))", "X"),
        ("sqrt(square(W))", "abs(W)"),
        ("abs(abs(W) * X)", "abs(W) * X"),
        ("X * abs(W)", "abs(W) * X"),
        ("abs(W) * abs(W) * minmax(abs(G))", "minmax(G) * square(W)"),
        ("min(X, X) + 2 * 3 - 6", "X + 6 - 6"),  # sums are not regrouped: that rounds differently
        ("log(-1) * 0", "0 * log(-1)"),
        ("(W - W) * X + 1 * G", "G"),
        ("W / W", "W / W"),
        ("minmax(minmax(W))", "minmax(W)"),
        ("-1 * (W - X)", "X - W"),
    ],
)
def test_examples_of_simplification(text, simple):
    assert simplify(parse(text)) == simplify(parse(simple))
    assert len(print_formula(simplify(parse(text)))) <= len(print_formula(parse(simple)))
