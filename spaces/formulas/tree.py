"""Formulas as immutable trees: nodes, fold, subtrees, replacement. Independent of the table of `operators`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

DEEPEST = 64

LARGEST = 512
"""Largest depth and number of nodes of a tree, so that recursion is safe."""

LEAST, GREATEST = 1e-30, 1e30
"""Magnitudes of constants other than 0: their squares are nearly within the range of fp32."""

R = TypeVar("R")

Path: TypeAlias = tuple[int, ...]
"""Path to a node: indices of arguments from the root down."""


@dataclass(frozen=True)
class Terminal:
    """A quantity of the layer, such as ``W``."""

    name: str
    depth = 1
    size = 1


@dataclass(frozen=True)
class Constant:
    """A constant.

    Raises:
        ValueError: unless it is 0 or its magnitude is within `LEAST` and `GREATEST`.
    """

    value: float
    depth = 1
    size = 1

    def __post_init__(self) -> None:
        if not is_constant(self.value):
            raise ValueError(
                f"Expected a constant that is 0 or of a magnitude within {LEAST:g} and {GREATEST:g}, got {self.value}."
            )
        object.__setattr__(self, "value", float(self.value) + 0.0)  # one zero, not two


@dataclass(frozen=True)
class Apply:
    """An operator and its arguments.

    Args:
        operator: its name.
        arguments: one or more trees.
        depth: number of nodes on the longest path down, itself included.
        size: number of nodes.

    Raises:
        ValueError: if the tree would be deeper than `DEEPEST` or larger than `LARGEST`.
    """

    operator: str
    arguments: tuple[Tree, ...]
    depth: int = field(init=False, compare=False, repr=False)
    size: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        depth = 1 + max(argument.depth for argument in self.arguments)
        size = 1 + sum(argument.size for argument in self.arguments)
        if depth > DEEPEST or size > LARGEST:
            raise ValueError(
                f"Expected a formula of at most {LARGEST} nodes, {DEEPEST} deep, got {size} nodes, {depth} deep."
            )
        object.__setattr__(self, "depth", depth)
        object.__setattr__(self, "size", size)


Tree: TypeAlias = Terminal | Constant | Apply


@dataclass(frozen=True)
class Bounds:
    """Largest depth and size of formulas; a single terminal has depth 1 and size 1.

    Raises:
        ValueError: if a bound is below 1 or above the limits of trees.
    """

    depth: int = 8
    size: int = 40

    def __post_init__(self) -> None:
        for name, limit in (("depth", DEEPEST), ("size", LARGEST)):
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"Expected `{name}` within 1 and {limit}, got {getattr(self, name)}.")

    def hold(self, tree: Tree) -> bool:
        return tree.depth <= self.depth and tree.size <= self.size


WIDEST = Bounds(DEEPEST, LARGEST)


def is_constant(value: float) -> bool:
    """True if the value is valid for a constant; never for NaN and infinity."""
    return value == 0 or (math.isfinite(value) and LEAST <= abs(value) <= GREATEST)


def fold(
    tree: Tree,
    terminal: Callable[[str], R],
    constant: Callable[[float], R],
    apply: Callable[[str, Sequence[R]], R],
) -> R:
    """Bottom-up evaluation of a tree."""
    if isinstance(tree, Terminal):
        return terminal(tree.name)
    if isinstance(tree, Constant):
        return constant(tree.value)
    return apply(tree.operator, [fold(x, terminal, constant, apply) for x in tree.arguments])


def terminals_in(tree: Tree) -> frozenset[str]:
    """Names of the terminals in a tree."""
    return frozenset(node.name for _, node in subtrees(tree) if isinstance(node, Terminal))


def plain(tree: Tree) -> Any:
    """The tree as nested lists of names and numbers, for records: ``["mul", ["abs", "W"], "X"]``."""
    return fold(tree, str, float, lambda operator, arguments: [operator, *arguments])


def subtrees(tree: Tree) -> Iterator[tuple[Path, Tree]]:
    """All nodes with their paths, in pre-order."""
    yield (), tree
    if isinstance(tree, Apply):
        for i, argument in enumerate(tree.arguments):
            for path, found in subtrees(argument):
                yield (i, *path), found


def replace_at(tree: Tree, path: Path, new: Tree) -> Tree:
    """A copy of the tree with another subtree at a path.

    Raises:
        ValueError: if the path does not exist, or the result would be too deep or too large.
    """
    if not path:
        return new
    if not isinstance(tree, Apply) or path[0] >= len(tree.arguments):
        raise ValueError(f"Expected a path in the tree, got {path} below {tree}.")
    i, *rest = path
    arguments = list(tree.arguments)
    arguments[i] = replace_at(arguments[i], tuple(rest), new)
    return Apply(tree.operator, tuple(arguments))


def constants_of(tree: Tree) -> tuple[float, ...]:
    """Constants other than 0, from left to right, which can be tuned."""
    return tuple(value for _, value in _places(tree))


def with_constants(tree: Tree, values: Sequence[float]) -> Tree:
    """A copy of the tree with other values for the constants in `constants_of`, not simplified.

    Raises:
        ValueError: if the number of values is wrong, or a value is invalid for a constant.
    """
    places = _places(tree)
    if len(values) != len(places):
        raise ValueError(f"Expected {len(places)} constants, got {len(values)}.")
    for (path, _), value in zip(places, values, strict=True):
        tree = replace_at(tree, path, Constant(value))
    return tree


def _places(tree: Tree) -> list[tuple[Path, float]]:
    return [(path, node.value) for path, node in subtrees(tree) if isinstance(node, Constant) and node.value]
