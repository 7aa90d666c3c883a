from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.formulas import operations
from secateur.pruners.formulas.terminals import terminals_of
from secateur.spaces.formulas.grammar import LONGEST, FormulaTextError, parse, print_formula
from secateur.spaces.formulas.known import KNOWN
from secateur.spaces.formulas.latex import latex
from secateur.spaces.formulas.metric import formula_of, metric_of
from secateur.spaces.formulas.mutation_crossover import crossover, mutate_hoist, mutate_point, mutate_subtree
from secateur.spaces.formulas.operators import OPERATORS, TERMINALS
from secateur.spaces.formulas.random_trees import Palette, ramped, random_tree
from secateur.spaces.formulas.tree import (
    DEEPEST,
    LARGEST,
    Apply,
    Bounds,
    Constant,
    Terminal,
    Tree,
    plain,
    replace_at,
    subtrees,
)
from tests.formula_values import seeds, trees
from tests.models import small_anatomy

BOUNDS = Bounds(6, 20)


# --- tables ---


def test_pruners_and_spaces_name_the_same_operators_and_terminals():
    assert list(OPERATORS) == list(operations.OPERATIONS)
    linear = next(small_anatomy().linears)
    inputs = InputStatistics(5, torch.ones(linear.in_features), torch.eye(linear.in_features))
    absolute = linear.weight.abs()
    gradients = {
        "rms": absolute,
        "contrast_rms": absolute,
        "damage_norms": absolute[0],
        "contrast_norms": absolute[0],
    }
    whole = ModelStatistics(2, {kind: {linear.name: x} for kind, x in gradients.items()})
    assert list(terminals_of(linear, TERMINALS, inputs, whole)) == list(TERMINALS)
    from_weights = [name for name, row in TERMINALS.items() if row.source == "weights"]
    assert list(terminals_of(linear, from_weights, None, ModelStatistics(2, {}))) == from_weights


@pytest.mark.parametrize("name", OPERATORS)
def test_what_an_operator_says_of_its_domain_is_so(name):
    """Undefined values are never patched: outside the domain there is NaN or infinity."""
    function = operations.OPERATIONS[name]
    outside = {
        "sqrt": [(-1.0,)],
        "log": [(0.0,), (-1.0,)],
        "exp": [(1e4,)],
        "div": [(1.0, 0.0), (0.0, 0.0)],
        "pow": [(-8.0, 1 / 3), (0.0, -1.0)],
        "minmax": [(2.0,)],
        "zscore": [(0.1,)],
    }
    for point in outside.get(name, []):
        arguments = [torch.full((3, 7), x, dtype=torch.float64) for x in point]
        assert not torch.isfinite(function(*arguments)).any()
    inside = [torch.linspace(0.5, 2, 21, dtype=torch.float64).reshape(3, 7)] * OPERATORS[name].arity
    assert torch.isfinite(function(*inside)).all()


def test_whole_matrix_operators_do_not_see_that_a_vector_is_repeated():
    vector = torch.tensor([[3.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    for name in ("minmax", "zscore", "rank"):
        function = operations.OPERATIONS[name]
        assert torch.allclose(function(vector).expand(5, 4), function(vector.expand(5, 4)))
    assert operations.rank(vector).tolist() == [[0.875, 0.25, 0.25, 0.625]]


# --- text ---


@given(trees)
def test_a_formula_is_read_as_it_was_printed(tree):
    text = print_formula(tree)
    assert parse(text) == tree
    assert print_formula(parse(text)) == text
    assert formula_of(metric_of(tree)) == tree


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" abs( W )*X ", "abs(W) * X"),
        ("W - (X - G)", "W - (X - G)"),
        ("(W - X) - G", "W - X - G"),
        ("(W + X) * G / 2", "(W + X) * G / 2"),
        ("-W * -2.50", "neg(W) * -2.5"),
        ("--W", "neg(neg(W))"),
        ("mul(W, add(X, 1e-3))", "W * (X + 0.001)"),
    ],
)
def test_canonical_text(text, canonical):
    assert print_formula(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("", 1, "got the end"),
        ("abs(W) * Y", 10, r"Expected a known name, got 'Y' .* Known: W G X"),
        ("minmx(W)", 1, "Did you mean 'minmax'"),
        ("W + abs(W, X)", 5, "Expected 1 argument of abs, got more"),
        ("min(W)", 1, "Expected 2 arguments of min, got 1"),
        ("abs W", 5, r"Expected `\(` after the operator abs, got 'W'"),
        ("(W + X", 7, r"Expected `\)`, got the end"),
        ("W) + X", 2, r"Expected `\+`, `-`, `\*`, `/` or the end, got '\)'"),
        ("W ** 2", 4, "Expected a number, a terminal"),
        ("W.real", 2, r"got '\.'"),
        ("2 * 1e999", 5, "Expected a constant"),
        ("1e-999", 1, "Expected a constant"),
        ("nan", 1, "Expected a known name"),
        ("W + X +", 8, "got the end"),
        ("(" * 200 + "W" + ")" * 200, 81, "nested parentheses"),
        ("abs(" * 70 + "W" + ")" * 70, 25, "64 deep"),
        ("W+" * 100 + "W", 128, "64 deep"),
    ],
)
def test_errors_say_where(text, column, said):
    with pytest.raises(FormulaTextError, match=said) as caught:
        parse(text)
    assert caught.value.column == column
    assert "\n" not in str(caught.value)


def test_bounds_are_held_by_the_parser():
    assert parse("abs(W) * X", Bounds(3, 4)) == parse("abs(W) * X")
    for bounds in (Bounds(2, 4), Bounds(3, 3)):
        with pytest.raises(FormulaTextError, match="got depth 3 and size 4"):
            parse("abs(W) * X", bounds)


HOSTILE = [
    "__import__('os').system('true')",
    "W.__class__.__mro__",
    "abs.__globals__",
    "lambda: W",
    "[W for W in X]",
    "exec(W)",
    "W if X else G",
    "{W}",
    "f'{W}'",
    "W;X",
    "W\\",
    "W\nX",
    "9" * 3999,
    "1e" + "9" * 3000,
    "(" * 10_000,
    "abs(" * 10_000,
    "-" * LONGEST,
    "W" * 10_000_000,
    "W + " * 2_000_000,
    "\x00",
    "\uff37",  # looks like W, is another letter
    "W\u202e",
    "\u0661",  # a digit elsewhere
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_are_refused(text):
    with pytest.raises(FormulaTextError) as caught:
        parse(text)
    assert len(str(caught.value)) < 400


words = st.sampled_from(
    [
        *TERMINALS,
        *OPERATORS,
        *"+-*/(),.;[]{}'\"^%=!@#\\ ",
        "__class__",
        "1",
        "1e9",
        "e",
        "lambda ",
        "((((",
        "\n",
    ]
)


@examples(max_examples=500)
@given(st.one_of(st.text(max_size=60), st.lists(words, max_size=40).map("".join)))
def test_any_text_is_a_formula_or_refused(text):
    tree, error = None, None
    try:
        tree = parse(text)
    except FormulaTextError as caught:
        error = caught
    if error is None:
        assert parse(print_formula(tree)) == tree
    else:
        assert 1 <= error.column <= len(text) + 1
        assert "\n" not in str(error)


# --- trees ---


@given(trees)
def test_size_depth_and_places(tree):
    places = dict(subtrees(tree))
    assert len(places) == tree.size
    assert max(map(len, places)) + 1 == tree.depth
    for path, found in places.items():
        assert replace_at(tree, path, found) == tree
    assert replace_at(tree, (), Terminal("W")) == Terminal("W")


def test_trees_have_limits_whoever_makes_them():
    deep: Tree = Terminal("W")
    for _ in range(DEEPEST - 1):
        deep = Apply("abs", (deep,))
    with pytest.raises(ValueError, match=f"at most {LARGEST} nodes, {DEEPEST} deep"):
        Apply("abs", (deep,))
    wide: Tree = Terminal("W")
    for _ in range(8):
        wide = Apply("add", (wide, wide))
    with pytest.raises(ValueError, match="1023 nodes"):
        Apply("add", (wide, wide))
    for bad in (float("nan"), float("inf"), 1e31, -1e-31):
        with pytest.raises(ValueError, match="Expected a constant"):
            Constant(bad)
    with pytest.raises(ValueError, match="Expected a path"):
        replace_at(Terminal("W"), (0,), Terminal("X"))
    assert print_formula(Constant(-0.0)) == "0"


# --- random formulas and variation ---


@given(seeds, st.integers(1, 8), st.integers(1, 30))
@examples(max_examples=40)
def test_random_formulas_and_their_children_stay_within_bounds(seed, depth, size):
    bounds, rng = Bounds(depth, size), np.random.default_rng(seed)
    parents = ramped(rng, 6, bounds)
    texts = [print_formula(x) for x in parents]
    for mother, father in itertools.pairwise(parents):
        children = [
            crossover(rng, mother, father, bounds),
            mutate_subtree(rng, mother, bounds),
            mutate_point(rng, mother),
            mutate_hoist(rng, mother),
        ]
        assert all(bounds.hold(child) for child in [mother, father, *children])
        assert children[2].size == mother.size
        assert children[3].size <= mother.size
        assert all(parse(print_formula(child)) == child for child in children)
    assert texts == [print_formula(x) for x in parents]


def test_random_formulas_repeat_vary_and_keep_to_the_palette():
    palette = Palette(("W", "X"), ("abs", "mul"), constants=0)
    found = [ramped(np.random.default_rng(7), 200, Bounds(5, 40), palette) for _ in range(2)]
    assert found[0] == found[1]
    assert {x.depth for x in found[0]} == {2, 3, 4, 5}
    assert len(set(found[0])) > 50
    names = {getattr(x, "operator", getattr(x, "name", None)) for t in found[0] for _, x in subtrees(t)}
    assert names == {"W", "X", "abs", "mul"}
    full = random_tree(np.random.default_rng(0), 4, 40, full=True, palette=palette)
    assert {len(path) for path, x in subtrees(full) if isinstance(x, Terminal)} == {3}
    with pytest.raises(ValueError, match="Expected `operators` out of"):
        Palette(operators=("eval",))


def test_mutations_change_something():
    rng, tree = np.random.default_rng(0), parse("abs(W) * X + 2")
    for mutate in (mutate_point, mutate_hoist, lambda r, t: mutate_subtree(r, t, BOUNDS)):
        assert len({mutate(rng, tree) for _ in range(40)}) > 3
    assert len({crossover(rng, tree, parse("log(G) / H"), BOUNDS) for _ in range(40)}) > 10


# --- other forms ---


def test_latex():
    assert latex(parse("abs(W) * X")) == r"\lvert W \rvert \cdot \lVert X \rVert_2"
    assert latex(parse("square(W - G) / sqrt(2)")) == r"\frac{\left( W - G \right)^{2}}{\sqrt{2}}"
    assert latex(parse("W - (G - 1e-5)")) == r"W - \left( G - 1 \cdot 10^{-5} \right)"
    assert latex(parse("-2 * neg(W)")) == r"\left( -2 \right) \cdot \left( -W \right)"


@given(trees)
def test_latex_has_balanced_braces(tree):
    text = latex(tree)
    assert text.count("{") == text.count("}")
    assert text.count(r"\left(") == text.count(r"\right)")


def test_known_formulas_are_formulas():
    for row in KNOWN.values():
        assert print_formula(parse(row.text)) == row.text
        assert row.paper.startswith("https://")
    assert plain(parse(KNOWN["wanda"].text)) == ["mul", ["abs", "W"], "X"]
    assert plain(formula_of("formula: -W * 2")) == ["mul", ["neg", "W"], 2.0]
    assert formula_of("wanda") is None
