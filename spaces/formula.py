"""The space `formula`: importance metrics as expressions, each at the same sparsity of all linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from secateur.spaces.budget import n_zeros
from secateur.spaces.cost import ModelShape
from secateur.spaces.formulas.grammar import parse, print_formula
from secateur.spaces.formulas.known import KNOWN
from secateur.spaces.formulas.latex import latex
from secateur.spaces.formulas.metric import metric_of
from secateur.spaces.formulas.sampling import Palette, ramped
from secateur.spaces.formulas.simplify import simplify
from secateur.spaces.formulas.tree import Bounds, Terminal, Tree, subtrees
from secateur.spaces.formulas.variation import crossover, mutate_hoist, mutate_point, mutate_subtree
from secateur.spaces.space import Space
from secateur.spaces.units import Prunable

DENSE = "dense"
ATTEMPTS = 20
_MUTATIONS = (mutate_subtree, mutate_point, mutate_hoist)


@dataclass(frozen=True)
class Formula:
    """A candidate: an importance metric, or None for the dense model."""

    tree: Tree | None

    @cached_property
    def text(self) -> str:
        """Canonical text, e.g. ``abs(W) * X``."""
        return DENSE if self.tree is None else print_formula(self.tree)


class FormulaSpace(Space[Formula]):
    """Formulas within bounds, simplified; what pruning by them means is one sparsity for each linear.

    Formulas of different texts may prune alike, and random ones are often undefined: both are recognised where they
    are measured, before any data is.

    Args:
        free: linears that are pruned.
        protected: linears that stay dense.
        target: sparsity of each free linear.
        shape: of the dense model.
        bounds: of formulas.
        palette: what they are made of.
        known: names in `KNOWN`; those that fit are baselines, the first one that the others are compared with.

    Raises:
        ValueError: if none of them fits.
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
        self._known = {name: tree for name in known if self._fits(tree := parse(KNOWN[name].text))}
        if not self._known:
            raise ValueError(
                f"Expected a published formula that fits `depth`, `size` and `terminals`, got none of "
                f"{', '.join(known)}. Raise the bounds, add terminals, or name others in `known`."
            )

    def _fits(self, tree: Tree) -> bool:
        used = {node.name for _, node in subtrees(tree) if isinstance(node, Terminal)}
        return self._bounds.hold(tree) and used <= set(self._palette.terminals)

    shown_as = "formula"

    @property
    def budgets(self) -> tuple[float, ...]:
        return (self._target,)

    @property
    def terminals(self) -> tuple[str, ...]:
        """The quantities that formulas may use."""
        return self._palette.terminals

    def parse(self, text: str) -> Formula:
        """The formula; `text` must be its canonical one, within the bounds.

        Raises:
            FormulaTextError: with the position, if it is no formula.
            ValueError: if it is none of this space.
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
        named = {DENSE: Formula(None), f"{first}@{self._target:.10g}": Formula(tree)}
        return named | {name: Formula(tree) for name, tree in others}

    def budget_of(self, candidate: Formula) -> int | None:
        return None if candidate.tree is None else 0

    def sample(self, rng: np.random.Generator, budget: int) -> Formula:
        """A random formula, of random depth, that uses the weights."""
        for _ in range(ATTEMPTS):
            tree = simplify(ramped(rng, 8, self._bounds, self._palette)[rng.integers(8)])
            if self._uses_weights(tree):
                return Formula(tree)
        return self._any_known(rng)

    def mutate(self, candidate: Formula, rng: np.random.Generator) -> Formula:
        """A subtree made anew (half of the time), a node exchanged, or a subtree hoisted."""
        if candidate.tree is None:
            return self._any_known(rng)
        for _ in range(ATTEMPTS):
            kind = rng.choice(3, p=(0.5, 0.3, 0.2))
            child = self._mutated(rng, candidate.tree, int(kind))
            if child != candidate.tree and self._uses_weights(child):
                return Formula(child)
        return self.sample(rng, 0)

    def _mutated(self, rng: np.random.Generator, tree: Tree, kind: int) -> Tree:
        arguments: tuple[tuple[Any, ...], ...] = ((self._bounds, self._palette), (self._palette,), ())
        return simplify(_MUTATIONS[kind](rng, tree, *arguments[kind]))

    def crossover(self, first: Formula, second: Formula, rng: np.random.Generator) -> Formula:
        if first.tree is None or second.tree is None:
            return self.mutate(first, rng)
        child = simplify(crossover(rng, first.tree, second.tree, self._bounds))
        return Formula(child) if self._uses_weights(child) else first

    def repair(self, candidate: Formula, budget: int, rng: np.random.Generator) -> Formula:
        return self._any_known(rng) if candidate.tree is None else candidate

    def _any_known(self, rng: np.random.Generator) -> Formula:
        trees = list(self._known.values())
        return Formula(trees[rng.integers(len(trees))])

    def _uses_weights(self, tree: Tree) -> bool:
        """Others tell no rows apart."""
        return any(isinstance(node, Terminal) and node.name in {"W", "G"} for _, node in subtrees(tree))

    def cost(self, candidate: Formula) -> Mapping[str, float]:
        zeros, shape = (0 if candidate.tree is None else self._n_zeros), self._shape
        return {
            "sparsity": zeros / self._n_weights,
            "params": shape.n_params - zeros,
            "size_bytes": shape.n_params * shape.bytes_per_param,
            "macs": shape.macs_per_token,
            "kv_bytes": shape.kv_bytes_per_token,
            # More than any formula: without one the dense model would beat all of them in everything.
            "nodes": self._bounds.size + 1 if candidate.tree is None else candidate.tree.size,
        }

    def config(self, candidate: Formula) -> Mapping[str, Any]:
        """``{"sparsity": {name of the linear: its sparsity}, "metric": "formula: ..."}``."""
        if candidate.tree is None:
            return {"sparsity": dict.fromkeys(self._sparsity, 0.0), "metric": ""}
        return {"sparsity": dict(self._sparsity), "metric": metric_of(candidate.tree)}

    def typeset(self, candidate: Formula) -> str:
        return "" if candidate.tree is None else latex(candidate.tree)
