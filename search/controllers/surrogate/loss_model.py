"""Model of the loss of a study's candidates, learnt from all measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from secateur.search.controllers.knapsack import Array
from secateur.search.controllers.separable import TargetSolver
from secateur.search.controllers.surrogate.features import Features
from secateur.search.controllers.surrogate.regression import Regression
from secateur.spaces.space import SeparableSpace

LEAST_LOSS = 1e-6  # below it losses count as this, as their logarithm is learnt
EXCESSES = (0.1, 0.3, 1.0)  # of the logarithm over the best: ends of groups with equal residual scale
REFIT = 20  # new measurements that make a new fit: one in so many
TEMPERATURE = 0.5  # factor of the deviation of draws from the mean: with 1, many slots make them too wild
ROUNDS = 2  # solutions with pair terms, each with the neighbours of the one before


class LossModel:
    """Linear model of the log-loss over the features of each target, with all measurements as evidence.

    A measurement adds a constant of its target and one of its fidelity, so that fidelities and targets share what
    they tell about slots. How far the model is off differs: measurements of a fidelity and of a similar excess over
    the best one share a residual scale. Candidates far from the best, where losses add up least, thus count less.

    Args:
        space: of the candidates.
        features: of each target.
        n_fidelities: of the study.
        centers: positions of a typical good candidate of each target.
        spread: see `Regression`.
    """

    def __init__(
        self,
        space: SeparableSpace[Any],
        features: Mapping[int, Features],
        n_fidelities: int,
        centers: Mapping[int, Sequence[int]],
        spread: float,
    ) -> None:
        self._space = space
        self._features = features
        self._n_fidelities = n_fidelities
        self._centers = dict(centers)
        self._targets = sorted(features)
        self._solvers = {target: TargetSolver(space, target) for target in self._targets}
        mean, deviation, scaled = features[self._targets[0]].prior
        n_own = (
            len(self._targets) + n_fidelities - 1
        )  # constants of targets and of fidelities below the largest
        own = np.repeat([10.0, 0.3], [len(self._targets), n_fidelities - 1])
        self._regression = Regression(
            np.concatenate([np.zeros(n_own), mean]),
            np.concatenate([own, deviation]),
            np.concatenate([np.zeros(n_own, dtype=bool), scaled]),
            (n_fidelities, len(EXCESSES) + 1),
            spread,
        )
        self._positions: list[tuple[int, ...]] = []
        self._kinds: list[tuple[int, int]] = []  # target, fidelity
        self._logs: list[float] = []
        self._best: dict[tuple[int, int], float] = {}
        self._worst: dict[tuple[int, int], float] = {}
        self._groups: list[int] = []  # of those that the regression knows
        self._n_fitted = 0

    def learn(self, target: int, fidelity: int, candidate: Any, loss: float) -> None:
        """A measurement; an infeasible one, of infinite loss, counts as the worst of its kind."""
        kind = (target, fidelity)
        if target not in self._features:
            return
        log = math.log(max(loss, LEAST_LOSS))
        if not math.isfinite(log):
            if kind not in self._worst:
                return
            log = self._worst[kind]
        self._positions.append(self._positions_of(candidate))
        self._kinds.append(kind)
        self._logs.append(log)
        self._best[kind] = min(log, self._best.get(kind, math.inf))
        self._worst[kind] = max(log, self._worst.get(kind, -math.inf))

    def refit(self) -> None:
        """Refit to what was learnt, unless little is new."""
        n = len(self._logs)
        if n - self._n_fitted < max(1, self._n_fitted // REFIT):
            return
        self._regroup()
        self._regression.fit()
        self._n_fitted = n
        for target in self._targets:
            self._centers[target] = self._minimiser(target, self._regression.mean) or self._centers[target]

    def best(self, target: int) -> Any:
        """Candidate with the smallest expected log-loss."""
        return self._assembled(target, self._centers[target])

    def draw(self, target: int, rng: np.random.Generator) -> Any:
        """Minimiser of a draw from the posterior, half as far from its mean."""
        mean = self._regression.mean
        found = self._minimiser(target, mean + TEMPERATURE * (self._regression.draw(rng) - mean))
        return self.best(target) if found is None else self._assembled(target, found)

    def _regroup(self) -> None:
        """Add new measurements to the regression, and move those whose excess over the best is another one now."""
        logs, kinds = np.array(self._logs), self._kinds
        excess = logs - np.array([self._best[kind] for kind in kinds])
        fidelities = np.array([fidelity for _, fidelity in kinds])
        groups = fidelities * (len(EXCESSES) + 1) + np.searchsorted(EXCESSES, excess, side="right")
        old = np.full(len(groups), -1)
        old[: len(self._groups)] = self._groups
        changed = np.flatnonzero(groups != old)
        rows = self._rows([self._positions[i] for i in changed], [kinds[i] for i in changed])
        for of, sign in ((old, -1), (groups, 1)):
            for group in set(of[changed].tolist()) - {-1}:
                some = of[changed] == group
                self._regression.add(rows[some], logs[changed[some]], int(group), sign)
        self._groups = groups.tolist()

    def _rows(self, positions: Sequence[Sequence[int]], kinds: Sequence[tuple[int, int]]) -> Array:
        """Constants of targets and fidelities, and features."""
        targets = np.array([target for target, _ in kinds])
        fidelities = np.array([fidelity for _, fidelity in kinds])
        at = np.array(positions, dtype=np.int64)
        constants = [targets == target for target in self._targets]
        constants += [fidelities == fidelity for fidelity in range(self._n_fidelities - 1)]
        rows = np.zeros((len(at), len(constants) + self._features[self._targets[0]].n))
        rows[:, : len(constants)] = np.array(constants).T
        for target in self._targets:
            some = targets == target
            if some.any():
                rows[some, len(constants) :] = self._features[target].of(at[some])
        return rows

    def _minimiser(self, target: int, weights: Array) -> tuple[int, ...] | None:
        """Positions with the smallest log-loss that meet the target; None if nothing allowed meets it."""
        features, at, best = self._features[target], self._centers[target], None
        own = weights[-features.n :]
        for _ in range(ROUNDS):
            candidate = self._solvers[target].solve(features.slot_losses(own, at))
            if candidate is None:
                break
            at = self._positions_of(candidate)
            value = float(features.of(np.array([at]))[0] @ own)
            if best is None or value < best[0]:
                best = (value, at)
        return None if best is None else best[1]

    def _positions_of(self, candidate: Any) -> tuple[int, ...]:
        chosen = enumerate(self._space.disassemble(candidate))
        return tuple(self._space.options(slot).index(option) for slot, option in chosen)

    def _assembled(self, target: int, positions: Sequence[int]) -> Any:
        options = [self._space.options(slot)[position] for slot, position in enumerate(positions)]
        candidate = self._space.assemble(options)
        return self._space.repair(candidate, target, np.random.default_rng(0))
