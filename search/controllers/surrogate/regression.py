"""Bayesian linear regression with groups of unequal residual scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

USUAL_SCALE = (
    0.03  # prior of the residual scales, in units of the targets, with the weight of so many observations
)
N_USUAL = 2.0
SPREADS = (0.03, 0.1, 0.3, 1.0, 3.0)  # factors of the prior standard deviations to choose from


class Regression:
    """Conjugate regression on features, each group of observations with a residual scale of its own.

    The observations enter by their sums of products, so that adding some costs the same however many there are, and
    the posterior is recomputed from these sums alone. The residual scale of each group, and one factor of the prior
    standard deviations of the features that have it, are estimated by empirical Bayes: a step of expectation
    maximisation a fit for the former (MacKay, https://doi.org/10.1162/neco.1992.4.3.415), the larger evidence of two
    neighbouring factors for the latter.

    Args:
        mean: prior mean of each weight.
        deviation: prior standard deviation of each weight.
        scaled: True for weights whose deviation has the common factor.
        shape: of the groups: kinds of observations, and of each kind groups whose residual scale never falls.
        spread: the first factor, one of `SPREADS`.
    """

    def __init__(
        self, mean: Array, deviation: Array, scaled: NDArray[np.bool_], shape: tuple[int, int], spread: float
    ) -> None:
        n, n_groups = len(mean), shape[0] * shape[1]
        self._shape = shape
        self._prior, self._deviation, self._scaled = mean, deviation, scaled
        self._products: list[Array | None] = [None] * n_groups  # (n, n) sums over the observations of a group
        self._moments = np.zeros((n_groups, n))
        self._squares = np.zeros(n_groups)
        self._counts = np.zeros(n_groups)
        self._scales = np.full(n_groups, USUAL_SCALE)
        self._spread = SPREADS.index(spread)
        self._direction = 1
        self.mean = mean.copy()
        self._root = np.diag(1 / self._deviations(self._spread))

    @property
    def scales(self) -> Array:
        """Residual scale of each group."""
        return self._scales.reshape(self._shape)

    @property
    def spread(self) -> float:
        """Factor of the prior standard deviations."""
        return SPREADS[self._spread]

    def add(self, features: Array, values: Array, group: int, sign: int = 1) -> None:
        """Observations of a group, ``(n, features)`` and ``n``; `sign` -1 takes them back."""
        residuals = values - features @ self._prior
        products = self._products[group]
        added = sign * (features.T @ features)
        self._products[group] = added if products is None else products + added
        self._moments[group] += sign * (residuals @ features)
        self._squares[group] += sign * float(residuals @ residuals)
        self._counts[group] += sign * len(values)

    def fit(self) -> None:
        """Recompute the posterior."""
        other = self._spread + self._direction
        if not 0 <= other < len(SPREADS):
            self._direction = -self._direction
            other = self._spread + self._direction
        own, neighbour = self._solve(self._spread), self._solve(other)
        if neighbour[0] > own[0]:
            self._spread, own = other, neighbour
        else:
            self._direction = -self._direction
        _, shift, self._root = own
        self.mean = self._prior + shift
        self._rescale(shift)

    def draw(self, rng: np.random.Generator) -> Array:
        """Weights drawn from the posterior."""
        from scipy.linalg import solve_triangular  # takes half a second to import

        noise = rng.standard_normal(len(self.mean))
        drawn: Array = self.mean + solve_triangular(self._root.T, noise, lower=False)
        return drawn

    def _deviations(self, spread: int) -> Array:
        return np.where(self._scaled, self._deviation * SPREADS[spread], self._deviation)

    def _solve(self, spread: int) -> tuple[float, Array, Array]:
        """Logarithm of the evidence up to a constant, shift of the mean, and Cholesky factor of the precision."""
        deviations, weights = self._deviations(spread), self._scales**-2
        precision = np.diag(deviations**-2)
        for weight, products in zip(weights, self._products, strict=True):
            if products is not None:
                precision += weight * products
        moment = weights @ self._moments
        root = np.asarray(np.linalg.cholesky(precision), dtype=float)
        half = np.linalg.solve(root, moment)
        shift: Array = np.linalg.solve(root.T, half)
        log_evidence = float(half @ half) / 2 - float(np.log(np.diag(root)).sum() + np.log(deviations).sum())
        return log_evidence, shift, root

    def _rescale(self, shift: Array) -> None:
        """One step of expectation maximisation for the residual scales."""
        inverse = np.linalg.inv(self._root)
        covariance = inverse.T @ inverse
        for group, products in enumerate(self._products):
            if products is not None and self._counts[group]:
                fitted = float(shift @ products @ shift - 2 * shift @ self._moments[group])
                residual = self._squares[group] + fitted + float(np.sum(covariance * products))
                total = N_USUAL * USUAL_SCALE**2 + max(residual, 0.0)
                self._scales[group] = np.sqrt(total / (N_USUAL + self._counts[group]))
        rising = np.maximum.accumulate(self.scales, axis=1)  # else a few distant observations may rule
        self._scales = rising.ravel()
