"""New formulas of the controller `genetic`: crossover, mutations and random formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

import numpy as np

from secateur.search.controllers.genetic_programming.population import Population
from secateur.search.controllers.genetic_programming.settings import GeneticSettings
from secateur.spaces.formulas.space import Formula, FormulaSpace

ATTEMPTS = 10  # formulas made for each new one, on average, before a generation is left smaller

Operation = Callable[[FormulaSpace, Callable[[], Formula], np.random.Generator], Formula]
"""Makes a formula of a space; each call of the second argument draws a parent."""

OPERATIONS: dict[str, Operation] = {
    "crossover": lambda space, parent, rng: space.crossover(parent(), parent(), rng),
    "subtree": lambda space, parent, rng: space.vary(parent(), "subtree", rng),
    "point": lambda space, parent, rng: space.vary(parent(), "point", rng),
    "hoist": lambda space, parent, rng: space.vary(parent(), "hoist", rng),
    "fresh": lambda space, parent, rng: space.sample(rng, 0),
}
"""Operations by the names in `VariationSettings`."""


class NewFormulas:
    """Source of formulas not proposed before, with counts."""

    def __init__(self, space: FormulaSpace, settings: GeneticSettings) -> None:
        self._space = space
        self._seen: set[str] = set()
        shares = settings.variation.model_dump()
        self._operations = [OPERATIONS[name] for name in shares]
        self._probabilities = np.array(list(shares.values())) / sum(shares.values())
        self.n_made = 0
        self.n_repeated = 0  # of these, with a known text

    def is_new(self, formula: Formula) -> bool:
        """True if the formula is new; it counts as known afterwards."""
        self.n_made += 1
        if formula.text in self._seen:
            self.n_repeated += 1
            return False
        self._seen.add(formula.text)
        return True

    def random(self, n: int, rng: np.random.Generator) -> list[Formula]:
        """`n` new random formulas by ramped half-and-half; fewer if no more are found."""
        batches = chain.from_iterable(self._space.ramped(rng, n) for _ in range(ATTEMPTS))
        return self._new(batches, n)

    def offspring(self, population: Population, n: int, rng: np.random.Generator) -> list[Formula]:
        """`n` new formulas from the population; fewer if no more are found."""

        def made() -> Iterator[Formula]:
            for _ in range(ATTEMPTS * n):
                operation = self._operations[rng.choice(len(self._operations), p=self._probabilities)]
                yield operation(self._space, lambda: population.parent(rng).formula, rng)

        return self._new(made(), n)

    def _new(self, formulas: Iterator[Formula], n: int) -> list[Formula]:
        return list(islice(filter(self.is_new, formulas), n))
