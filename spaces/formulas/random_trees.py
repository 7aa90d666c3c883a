"""Random formulas: Koza's ramped half-and-half (Genetic Programming, 1992, section 6.2), within bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.spaces.formulas.operators import OPERATORS, TERMINALS
from secateur.spaces.formulas.tree import Apply, Bounds, Constant, Terminal, Tree

DEEPEST_START = 6
"""Largest depth of random trees, whatever the bounds: the size of a full tree doubles with each level."""

_TRIES = 20

FIRST = tuple(
    name for name, row in TERMINALS.items() if row.source in ("weights", "moments", "gram", "gradients")
)
"""Terminals of one calibration set, none of whose tokens counts more than others."""


@dataclass(frozen=True)
class Palette:
    """Terminals, operators and constants of random formulas.

    Args:
        terminals, operators: names.
        constants: share of constants among the leaves, in [0, 1].

    Raises:
        ValueError: for an unknown name, no terminal, no operator, or a share outside [0, 1].
    """

    terminals: tuple[str, ...] = FIRST
    operators: tuple[str, ...] = tuple(OPERATORS)
    constants: float = 0.1

    def __post_init__(self) -> None:
        for name, known in (("terminals", TERMINALS), ("operators", OPERATORS)):
            given = getattr(self, name)
            unknown = [each for each in given if each not in known]
            if unknown or not given:
                raise ValueError(f"Expected `{name}` out of {', '.join(known)}, got {unknown or given}.")
        if not 0 <= self.constants <= 1:
            raise ValueError(f"Expected `constants` within [0, 1], got {self.constants}.")


ALL = Palette()


def ramped(rng: np.random.Generator, n: int, bounds: Bounds, palette: Palette = ALL) -> list[Tree]:
    """Random formulas with depths from 2 to the bound (at most `DEEPEST_START`) in turn, alternately full and grown."""
    deepest = min(bounds.depth, DEEPEST_START)
    depths = range(min(2, deepest), deepest + 1)
    return [
        random_tree(rng, depths[i // 2 % len(depths)], bounds.size, full=i % 2 == 0, palette=palette)
        for i in range(n)
    ]


def random_tree(
    rng: np.random.Generator, depth: int, size: int, *, full: bool, palette: Palette = ALL
) -> Tree:
    """A random formula.

    Args:
        depth: largest depth, 1 to `DEEPEST_START`; exact if `full` and `size` allow it.
        size: largest number of nodes; after repeated larger draws a shallower tree is drawn.
        full: all leaves at the bottom; else branches end at any depth, with the probability of a terminal among all
            terminals and operators.
    """
    for shallower in range(depth, 0, -1):
        for _ in range(_TRIES):
            tree = _grown(rng, shallower, full, palette)
            if tree.size <= size:
                return tree
    raise AssertionError("a tree of depth 1 has one node")


def random_leaf(rng: np.random.Generator, palette: Palette = ALL) -> Tree:
    """A terminal or a constant; constants are log-uniform from 0.01 to 100."""
    if rng.random() < palette.constants:
        return Constant(float(f"{10 ** rng.uniform(-2, 2):.3g}"))
    return Terminal(palette.terminals[rng.integers(len(palette.terminals))])


def _grown(rng: np.random.Generator, depth: int, full: bool, palette: Palette, *, root: bool = True) -> Tree:
    n_terminals, n_operators = len(palette.terminals), len(palette.operators)
    ends = not full and not root and rng.random() < n_terminals / (n_terminals + n_operators)
    if depth == 1 or ends:
        return random_leaf(rng, palette)
    name = palette.operators[rng.integers(n_operators)]
    arguments = [_grown(rng, depth - 1, full, palette, root=False) for _ in range(OPERATORS[name].arity)]
    return Apply(name, tuple(arguments))
