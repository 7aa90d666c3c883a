"""Simplification of formulas to a canonical form, by a table of rules.

Simplification preserves the values where the formula is defined: bit for bit by `exact` rules (except for the sign of
zero), up to rounding by the others. An undefined formula remains undefined, except that intermediate overflow or
underflow may vanish. No rule makes a formula larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from secateur.spaces.formulas.grammar import parse, print_formula
from secateur.spaces.formulas.operators import OPERATORS
from secateur.spaces.formulas.signs import facts_of
from secateur.spaces.formulas.tree import Apply, Constant, Terminal, Tree, fold, is_constant


@dataclass(frozen=True)
class RewriteRule:
    """Pattern and its replacement; x and y match any formula.

    Args:
        pattern, result: texts of the grammar. Arguments of commutative operators match in either order.
        exact: True if values are preserved bit for bit.
        positive, nonnegative: variables that must be known to be > 0, >= 0.
        total: variables that must be defined for all weights.
    """

    pattern: str
    result: str
    exact: bool = True
    positive: str = ""
    nonnegative: str = ""
    total: str = ""


RULES: tuple[RewriteRule, ...] = (
    RewriteRule("neg(neg(x))", "x"),
    RewriteRule("neg(x - y)", "y - x"),
    RewriteRule("abs(x)", "x", nonnegative="x"),
    RewriteRule("abs(neg(x))", "abs(x)"),
    RewriteRule("square(neg(x))", "square(x)"),
    RewriteRule("square(abs(x))", "square(x)"),
    RewriteRule("abs(x) * abs(y)", "abs(x * y)"),
    RewriteRule("abs(x) / abs(y)", "abs(x / y)"),
    RewriteRule("x * x", "square(x)"),
    RewriteRule("min(x, x)", "x"),
    RewriteRule("max(x, x)", "x"),
    RewriteRule("min(x, max(x, y))", "x", total="y"),
    RewriteRule("max(x, min(x, y))", "x", total="y"),
    RewriteRule("minmax(minmax(x))", "minmax(x)"),
    RewriteRule("0 + x", "x"),
    RewriteRule("x - 0", "x"),
    RewriteRule("0 - x", "neg(x)"),
    RewriteRule("1 * x", "x"),
    RewriteRule("-1 * x", "neg(x)"),
    RewriteRule("x / 1", "x"),
    RewriteRule("x / -1", "neg(x)"),
    RewriteRule("x + neg(y)", "x - y"),
    RewriteRule("x - neg(y)", "x + y"),
    RewriteRule("neg(x) * neg(y)", "x * y"),
    RewriteRule("neg(x) / neg(y)", "x / y"),
    RewriteRule("x - x", "0", total="x"),
    RewriteRule("0 * x", "0", total="x"),
    RewriteRule("0 / x", "0", positive="x", total="x"),
    RewriteRule("x / x", "1", positive="x", total="x"),
    RewriteRule("pow(x, 0)", "1", total="x"),
    RewriteRule("pow(1, x)", "1", total="x"),
    RewriteRule("pow(x, 1)", "x", exact=False),
    RewriteRule("pow(x, 2)", "square(x)", exact=False),
    RewriteRule("pow(x, 0.5)", "sqrt(x)", exact=False),
    RewriteRule("log(exp(x))", "x", exact=False),
    RewriteRule("exp(log(x))", "x", exact=False, positive="x"),
    RewriteRule("sqrt(square(x))", "abs(x)", exact=False),
    RewriteRule("square(sqrt(x))", "x", exact=False, nonnegative="x"),
    RewriteRule("zscore(zscore(x))", "zscore(x)", exact=False),
    RewriteRule("zscore(minmax(x))", "zscore(x)", exact=False),
    RewriteRule("minmax(zscore(x))", "minmax(x)", exact=False),
    RewriteRule("rank(rank(x))", "rank(x)", exact=False),
)


def simplify(tree: Tree, rules: tuple[RewriteRule, ...] = RULES) -> Tree:
    """Canonical form: no rule applies, and arguments of commutative operators are sorted.

    Operators of constants are computed, which rounds, unless all given rules are exact.
    """
    by_operator = _compiled(rules)
    folding = any(not rule.exact for rule in rules)

    def step(operator: str, arguments: Sequence[Tree]) -> Tree:
        node = Apply(operator, _ordered(operator, arguments))
        value = _computed(node) if folding else None
        if value is not None:
            return Constant(value)
        for rule, pattern, result in by_operator.get(operator, ()):
            found = _match(pattern, node, {})
            if found is not None and _allowed(rule, found):
                return _filled(result, found)
        return node

    while (simpler := fold(tree, Terminal, Constant, step)) != tree:
        tree = simpler
    return tree


_Compiled = Mapping[str, Sequence[tuple[RewriteRule, Tree, Tree]]]


@cache
def _compiled(rules: tuple[RewriteRule, ...]) -> _Compiled:
    """Rules as trees, by the root operator of the pattern."""
    by_operator: dict[str, list[tuple[RewriteRule, Tree, Tree]]] = {}
    for rule in rules:
        pattern, result = (parse(text, terminals=("x", "y")) for text in (rule.pattern, rule.result))
        assert isinstance(pattern, Apply)
        assert result.size < pattern.size
        by_operator.setdefault(pattern.operator, []).append((rule, pattern, result))
    return by_operator


def _match(pattern: Tree, tree: Tree, bound: dict[str, Tree]) -> dict[str, Tree] | None:
    """Values of x and y if the pattern matches."""
    if isinstance(pattern, Terminal):
        known = bound.setdefault(pattern.name, tree)
        return bound if known == tree else None
    if isinstance(pattern, Constant) or not isinstance(tree, Apply) or tree.operator != pattern.operator:
        return bound if pattern == tree else None
    orders = [tree.arguments]
    if OPERATORS[tree.operator].commutative:
        orders.append(tree.arguments[::-1])
    for arguments in orders:
        found: dict[str, Tree] | None = dict(bound)
        for part, argument in zip(pattern.arguments, arguments, strict=True):
            found = found if found is None else _match(part, argument, found)
        if found is not None:
            return found
    return None


def _allowed(rule: RewriteRule, found: Mapping[str, Tree]) -> bool:
    return (
        all(facts_of(found[name]).positive for name in rule.positive)
        and all(facts_of(found[name]).nonnegative for name in rule.nonnegative)
        and all(facts_of(found[name]).total for name in rule.total)
    )


def _filled(result: Tree, found: Mapping[str, Tree]) -> Tree:
    return fold(result, lambda name: found[name], Constant, lambda name, args: Apply(name, tuple(args)))


def _ordered(operator: str, arguments: Sequence[Tree]) -> tuple[Tree, ...]:
    """Arguments of a commutative operator sorted: constants first, then by descending size, then by text."""
    if not OPERATORS[operator].commutative:
        return tuple(arguments)
    return tuple(sorted(arguments, key=lambda x: (not isinstance(x, Constant), -x.size, print_formula(x))))


_COMPUTE: dict[str, Callable[..., float]] = {
    "abs": abs,
    "neg": lambda x: -x,
    "sqrt": math.sqrt,
    "square": lambda x: x * x,
    "log": math.log,
    "exp": math.exp,
    "tanh": math.tanh,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "pow": math.pow,
    "min": min,
    "max": max,
}
"""Scalar operators; operators of whole matrices are not computed."""


def _computed(node: Apply) -> float | None:
    """Value of an operator of constants; None if it is no valid constant."""
    values = [x.value for x in node.arguments if isinstance(x, Constant)]
    if len(values) < len(node.arguments) or node.operator not in _COMPUTE:
        return None
    try:
        value = float(_COMPUTE[node.operator](*values))
    except (ValueError, OverflowError, ZeroDivisionError):
        return None
    return value if is_constant(value) else None
