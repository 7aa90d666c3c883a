"""Mutation and crossover of formulas within bounds.

For parents within the bounds every child is too: exchanged subtrees are chosen to fit, without retries.
"""

from __future__ import annotations

import numpy as np

from secateur.spaces.formulas.operators import OPERATORS
from secateur.spaces.formulas.random_trees import ALL, DEEPEST_START, Palette, random_leaf, random_tree
from secateur.spaces.formulas.tree import (
    Apply,
    Bounds,
    Constant,
    Path,
    Terminal,
    Tree,
    is_constant,
    replace_at,
    subtrees,
)

_NEW_DEPTH = 4
_CONSTANT_SPREAD = 0.5


def crossover(rng: np.random.Generator, mother: Tree, father: Tree, bounds: Bounds) -> Tree:
    """The mother with a subtree replaced by one of the father's (Koza 1992, section 6.4.1).

    Uniform over the nodes of the mother, and over the father's subtrees that fit there; leaves always fit.
    """
    path, old = _any_place(rng, mother)
    room = _room(mother, path, old, bounds)
    fitting = [tree for _, tree in subtrees(father) if room.hold(tree)]
    return replace_at(mother, path, fitting[rng.integers(len(fitting))])


def mutate_subtree(rng: np.random.Generator, tree: Tree, bounds: Bounds, palette: Palette = ALL) -> Tree:
    """A random subtree replaced by a new random one of depth 1 to 4."""
    path, old = _any_place(rng, tree)
    room = _room(tree, path, old, bounds)
    depth = int(rng.integers(1, min(room.depth, _NEW_DEPTH, DEEPEST_START) + 1))
    return replace_at(tree, path, random_tree(rng, depth, room.size, full=False, palette=palette))


def mutate_point(rng: np.random.Generator, tree: Tree, palette: Palette = ALL) -> Tree:
    """One node replaced by another of the same arity; the shape of the tree is unchanged.

    A constant is multiplied by a log-normal factor half of the time. An operator that is the only one of its arity in
    the palette is unchanged.
    """
    path, old = _any_place(rng, tree)
    return replace_at(tree, path, _altered(rng, old, palette))


def mutate_hoist(rng: np.random.Generator, tree: Tree) -> Tree:
    """A random subtree replaced by one of its own subtrees; never larger."""
    path, old = _any_place(rng, tree)
    _, new = _any_place(rng, old)
    return replace_at(tree, path, new)


def _any_place(rng: np.random.Generator, tree: Tree) -> tuple[Path, Tree]:
    places = list(subtrees(tree))
    return places[rng.integers(len(places))]


def _room(tree: Tree, path: Path, old: Tree, bounds: Bounds) -> Bounds:
    """Bounds for a subtree at a path."""
    return Bounds(bounds.depth - len(path), bounds.size - tree.size + old.size)


def _altered(rng: np.random.Generator, node: Tree, palette: Palette) -> Tree:
    if isinstance(node, Apply):
        arity = len(node.arguments)
        others = [
            name for name in palette.operators if OPERATORS[name].arity == arity and name != node.operator
        ]
        name = others[rng.integers(len(others))] if others else node.operator
        return Apply(name, node.arguments)
    if isinstance(node, Constant) and rng.random() < 0.5:
        value = float(f"{node.value * np.exp(_CONSTANT_SPREAD * rng.standard_normal()):.3g}")
        return Constant(value) if is_constant(value) else node
    others = [name for name in palette.terminals if not (isinstance(node, Terminal) and node.name == name)]
    if not others:
        return node
    return random_leaf(rng, Palette(tuple(others), palette.operators, palette.constants))
