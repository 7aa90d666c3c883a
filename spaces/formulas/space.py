"""The space `formula`: importance metrics as expressions, at one sparsity of all linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from secateur.spaces.formulas.grammar import parse, print_formula
from secateur.spaces.formulas.known import known_tree
from secateur.spaces.formulas.latex import latex
from secateur.spaces.formulas.metric import metric_of
from secateur.spaces.formulas.mutation_crossover import crossover, mutate_hoist, mutate_point, mutate_subtree
from secateur.spaces.formulas.random_trees import Palette, ramped
from secateur.spaces.formulas.simplify import simplify
from secateur.spaces.formulas.tree import Bounds, Tree, constants_of, terminals_in, with_constants
from secateur.spaces.levels import n_zeros
from secateur.spaces.shape import ModelShape, Prunable
from secateur.spaces.space import Space

DENSE = "dense"
ATTEMPTS = 20
Mutation = Literal["subtree", "point", "hoist"]
MUTATIONS: tuple[Mutation, ...] = get_args(Mutation)


@dataclass(frozen=True)
class Formula:
    """A candidate: an importance metric, or None for the dense model."""

    tree: Tree | None

    @cached_property
    def text(self) -> str:
        """Canonical text, e.g. ``abs(W) * X``."""
        return DENSE if self.tree is None else print_formula(self.tree)


class FormulaSpace(Space[Formula]):
    """Simplified formulas within bounds, at one sparsity of all free linears.

    Different formulas may prune alike, and random ones are often undefined: the evaluator detects both before it
    measures on data.

    Args:
        free: linears to prune.
        protected: linears kept dense.
        target: sparsity of each free linear.
        known: see `known_tree`; those within the bounds are baselines, the first one is the reference.

    Raises:
        ValueError: if no known formula is within the bounds.
    """

    def __init__(
        self,
        free: Sequence[Prunable],
        protected: Sequence[Prunable],
        target: float,
        shape: ModelShape,
        *,
        bounds: Bounds,
        palette: Palette,
        known: Sequence[str],
    ) -> None:
        self._sparsity = {linear.name: 0.0 for linear in protected}
        self._sparsity |= {linear.name: target for linear in free}
        self._n_zeros = sum(n_zeros(target, linear.n_weights) for linear in free)
        self._n_weights = sum(linear.n_weights for linear in (*free, *protected))
        self._target = target
        self._shape = shape
        self._bounds = bounds
        self._palette = palette
        self._known = {name: tree for name in known if self._fits(tree := known_tree(name))}
        if not self._known:
            raise ValueError(
                f"Expected a published formula that fits `depth`, `size` and `terminals`, got none of "
                f"{', '.join(known)}. Raise the bounds, add terminals, or name others in `known`."
            )

    def _fits(self, tree: Tree) -> bool:
        return self._bounds.hold(tree) and terminals_in(tree) <= set(self._palette.terminals)

    shown_as = "formula"
    stand_ins = MappingProxyType({DENSE: frozenset({"nodes"})})

    @property
    def targets(self) -> tuple[float, ...]:
        return (self._target,)

    @property
    def terminals(self) -> tuple[str, ...]:
        return self._palette.terminals

    @property
    def reference(self) -> Formula:
        """Reference: the first published formula."""
        return next(iter(self.known.values()))

    @property
    def known(self) -> dict[str, Formula]:
        """Published formulas within the bounds, by name."""
        return {name: Formula(tree) for name, tree in self._known.items()}

    def parse(self, text: str) -> Formula:
        """Formula of a canonical text, within the bounds.

        Raises:
            FormulaTextError: with the position, if it is not a formula.
            ValueError: if it is not of this space.
        """
        if text == DENSE:
            return Formula(None)
        found = Formula(parse(text))
        if found.text != text or found.tree is None or not self._fits(found.tree):
            raise ValueError(
                f"Expected the canonical text of a formula of {', '.join(self._palette.terminals)} within the "
                f"bounds, got {text[:80]!r}."
            )
        return found

    def baselines(self) -> dict[str, Formula]:
        (first, tree), *others = self._known.items()
        named = {DENSE: Formula(None), self.named(first, 0): Formula(tree)}
        return named | {name: Formula(tree) for name, tree in others}

    def target_of(self, candidate: Formula) -> int | None:
        return None if candidate.tree is None else 0

    def sample(self, rng: np.random.Generator, target: int) -> Formula:
        """A random formula of random depth that uses the weights."""
        for _ in range(ATTEMPTS):
            tree = simplify(ramped(rng, 8, self._bounds, self._palette)[rng.integers(8)])
            if self._uses_weights(tree):
                return Formula(tree)
        return self._any_known(rng)

    def mutate(self, candidate: Formula, rng: np.random.Generator) -> Formula:
        """Subtree mutation (half of the time), point mutation or hoist."""
        if candidate.tree is None:
            return self._any_known(rng)
        for _ in range(ATTEMPTS):
            kind = rng.choice(3, p=(0.5, 0.3, 0.2))
            child = self.vary(candidate, MUTATIONS[kind], rng)
            if child != candidate:
                return child
        return self.sample(rng, 0)

    def vary(self, candidate: Formula, mutation: Mutation, rng: np.random.Generator) -> Formula:
        """One mutation, simplified; the formula itself if the result does not use the weights."""
        if candidate.tree is None:
            return candidate
        mutations = {
            "subtree": lambda tree: mutate_subtree(rng, tree, self._bounds, self._palette),
            "point": lambda tree: mutate_point(rng, tree, self._palette),
            "hoist": lambda tree: mutate_hoist(rng, tree),
        }
        child = simplify(mutations[mutation](candidate.tree))
        return Formula(child) if self._uses_weights(child) else candidate

    def ramped(self, rng: np.random.Generator, n: int) -> list[Formula]:
        """Random formulas by ramped half-and-half: those among `n` draws that use the weights."""
        trees = (simplify(tree) for tree in ramped(rng, n, self._bounds, self._palette))
        return [Formula(tree) for tree in trees if self._uses_weights(tree)]

    def constants(self, candidate: Formula) -> tuple[float, ...]:
        """The formula's constants other than 0, from left to right."""
        return () if candidate.tree is None else constants_of(candidate.tree)

    def with_constants(self, candidate: Formula, values: Sequence[float]) -> Formula:
        """The formula with other values for `constants`, simplified.

        Raises:
            ValueError: if the number of values is wrong, or a value is invalid for a constant.
        """
        if candidate.tree is None:
            return candidate
        child = simplify(with_constants(candidate.tree, values))
        return Formula(child) if self._uses_weights(child) else candidate

    def crossover(self, first: Formula, second: Formula, rng: np.random.Generator) -> Formula:
        if first.tree is None or second.tree is None:
            return self.mutate(first, rng)
        child = simplify(crossover(rng, first.tree, second.tree, self._bounds))
        return Formula(child) if self._uses_weights(child) else first

    def repair(self, candidate: Formula, target: int, rng: np.random.Generator) -> Formula:
        return self._any_known(rng) if candidate.tree is None else candidate

    def _any_known(self, rng: np.random.Generator) -> Formula:
        trees = list(self._known.values())
        return Formula(trees[rng.integers(len(trees))])

    def _uses_weights(self, tree: Tree) -> bool:
        """True if a formula uses W or G; others rank all rows alike."""
        return bool(terminals_in(tree) & {"W", "G"})

    def cost(self, candidate: Formula) -> Mapping[str, float]:
        dense = candidate.tree is None
        costs = self._shape.with_zeros(0 if dense else self._n_zeros, self._n_weights)
        # Larger than any formula: else the dense model would dominate all formulas.
        return costs | {"nodes": self._bounds.size + 1 if candidate.tree is None else candidate.tree.size}

    def config(self, candidate: Formula) -> Mapping[str, Any]:
        """``{"sparsity": {name of the linear: its sparsity}, "metric": "formula: ..."}``."""
        if candidate.tree is None:
            return {"sparsity": dict.fromkeys(self._sparsity, 0.0), "metric": ""}
        return {"sparsity": dict(self._sparsity), "metric": metric_of(candidate.tree)}

    def portable(self, candidate: Formula, linears: Sequence[Prunable]) -> Mapping[str, Any]:
        """``{"metric": "formula: ..."}``; the sparsity is that of the settings."""
        return {"metric": self.config(candidate)["metric"]}

    def typeset(self, candidate: Formula) -> str:
        return "" if candidate.tree is None else latex(candidate.tree)
