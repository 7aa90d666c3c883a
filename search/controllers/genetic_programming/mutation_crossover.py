"""Where the genetic controller's new formulas come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

import numpy as np

from secateur.search.controllers.genetic_programming.population import Population
from secateur.search.controllers.genetic_programming.settings import GeneticSettings
from secateur.spaces.formulas.space import Formula, FormulaSpace

ATTEMPTS = 10  # formulas made for one that is new, on average, before a generation stays smaller

Way = Callable[[FormulaSpace, Callable[[], Formula], np.random.Generator], Formula]
"""Makes a formula of a space; each call of the second argument is a parent."""

WAYS: dict[str, Way] = {
    "crossover": lambda space, parent, rng: space.crossover(parent(), parent(), rng),
    "subtree": lambda space, parent, rng: space.vary(parent(), "subtree", rng),
    "point": lambda space, parent, rng: space.vary(parent(), "point", rng),
    "hoist": lambda space, parent, rng: space.vary(parent(), "hoist", rng),
    "fresh": lambda space, parent, rng: space.sample(rng, 0),
}
"""By the names of `VariationSettings`."""


class Breeder:
    """Makes formulas that nobody proposed before; counts all that it makes.

    Args:
        space: of the formulas.
        settings: how often each way is taken.
    """

    def __init__(self, space: FormulaSpace, settings: GeneticSettings) -> None:
        self._space = space
        self._seen: set[str] = set()
        shares = settings.variation.model_dump()
        self._ways = [WAYS[name] for name in shares]
        self._probabilities = np.array(list(shares.values())) / sum(shares.values())
        self.n_made = 0
        self.n_repeated = 0  # of them: the text was there before

    def is_new(self, formula: Formula) -> bool:
        """Whether the formula was not there before; from now on it was."""
        self.n_made += 1
        if formula.text in self._seen:
            self.n_repeated += 1
            return False
        self._seen.add(formula.text)
        return True

    def random(self, n: int, rng: np.random.Generator) -> list[Formula]:
        """`n` new random formulas by ramped half-and-half; fewer where no more are found."""
        batches = chain.from_iterable(self._space.ramped(rng, n) for _ in range(ATTEMPTS))
        return self._new(batches, n)

    def offspring(self, population: Population, n: int, rng: np.random.Generator) -> list[Formula]:
        """`n` new formulas from the population; fewer where no more are found."""

        def made() -> Iterator[Formula]:
            for _ in range(ATTEMPTS * n):
                way = self._ways[rng.choice(len(self._ways), p=self._probabilities)]
                yield way(self._space, lambda: population.parent(rng).formula, rng)

        return self._new(made(), n)

    def _new(self, formulas: Iterator[Formula], n: int) -> list[Formula]:
        return list(islice(filter(self.is_new, formulas), n))
