"""The numbers in a formula: to read them, and to put others in their places."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.spaces.formulas.tree import Constant, Path, Tree, replace_at, subtrees


def constants_of(tree: Tree) -> tuple[float, ...]:
    """The constants other than 0, from left to right: those that can be scaled."""
    return tuple(value for _, value in _places(tree))


def with_constants(tree: Tree, values: Sequence[float]) -> Tree:
    """The tree with other constants in the places of `constants_of`; it is not simplified.

    Raises:
        ValueError: if there are fewer or more places than values, or a value is no constant.
    """
    places = _places(tree)
    if len(values) != len(places):
        raise ValueError(f"Expected {len(places)} constants, got {len(values)}.")
    for (path, _), value in zip(places, values, strict=True):
        tree = replace_at(tree, path, Constant(value))
    return tree


def _places(tree: Tree) -> list[tuple[Path, float]]:
    return [(path, node.value) for path, node in subtrees(tree) if isinstance(node, Constant) and node.value]
