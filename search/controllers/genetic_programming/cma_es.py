"""Tuning of a formula's constants by CMA-ES."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.search.controllers.genetic_programming.settings import ConstantsSettings
from secateur.spaces.formulas.space import Formula, FormulaSpace
from secateur.spaces.formulas.tree import is_constant

ATTEMPTS = 20  # points drawn for one new formula


class ConstantsTuner:
    """CMA-ES over the logarithms of a formula's constants, of which there must be one; their signs are fixed.

    Hansen, "The CMA evolution strategy: a tutorial" (https://arxiv.org/abs/1604.00772), by the package `cmaes`.
    Constants are rounded to three digits, so that formulas are readable.
    """

    def __init__(
        self, space: FormulaSpace, formula: Formula, settings: ConstantsSettings, rng: np.random.Generator
    ) -> None:
        import cmaes

        self._space, self._formula = space, formula
        values = np.array(space.constants(formula))
        self._signs = np.sign(values)
        self._cma = cmaes.CMA(
            mean=np.log(np.abs(values)),
            sigma=settings.spread,
            seed=int(rng.integers(2**31)),
            population_size=settings.population,
        )
        self._points: list[NDArray[np.float64]] = []

    def ask(self, is_new: Callable[[Formula], bool]) -> list[Formula]:
        """Formulas of the next step; none if too few new ones are found.

        Args:
            is_new: whether a formula may be proposed; it counts as known afterwards.
        """
        self._points, found = [], list[Formula]()
        for _ in range(self._cma.population_size * ATTEMPTS):
            point = self._cma.ask()
            formula = self._at(point)
            if formula is not None and is_new(formula):
                self._points.append(point)
                found.append(formula)
            if len(found) == self._cma.population_size:
                return found
        return []

    def tell(self, losses: Sequence[float]) -> None:
        """Tell the losses of the formulas, infinite for infeasible ones."""
        pairs: list[Any] = list(zip(self._points, losses, strict=True))
        self._cma.tell(pairs)

    def _at(self, point: NDArray[np.float64]) -> Formula | None:
        values = [float(f"{value:.3g}") for value in self._signs * np.exp(point)]
        if not all(value and is_constant(value) for value in values):
            return None
        return self._space.with_constants(self._formula, values)
