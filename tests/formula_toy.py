"""A landscape of formulas without a model: how far their ranking of some numbers is from that of a known formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from secateur.search.controller import Controller, Proposal, Trial
from secateur.spaces.formulas.grammar import parse
from secateur.spaces.formulas.settings import FormulaSettings, build_formula
from secateur.spaces.formulas.space import Formula, FormulaSpace
from secateur.spaces.formulas.tree import Tree, fold
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import ModelShape, Prunable

SHAPE = ModelShape(n_params=10_000, bytes_per_param=2, macs_per_token=10_000, kv_bytes_per_token=10)
LINEARS = [Prunable("model.layers.0.mlp.down_proj", 0, "mlp", 100)]
FIDELITIES = tuple(Fidelity("search", n_tokens) for n_tokens in (64, 256))
PROXY = Fidelity("proxy", 64)
TARGET = "abs(W) * sqrt(X) + G"

_NUMPY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "square": np.square,
    "log": np.log,
    "exp": np.exp,
    "tanh": np.tanh,
    "minmax": lambda x: (x - np.min(x)) / np.ptp(x),
    "zscore": lambda x: (x - np.mean(x)) / np.std(x),
    "rank": lambda x: np.searchsorted(np.sort(x, axis=None), x) / np.size(x),
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "min": np.minimum,
    "max": np.maximum,
}


def formula_space(**settings: Any) -> FormulaSpace:
    return build_formula(FormulaSettings(**settings), LINEARS, SHAPE)


class FormulaLandscape:
    """Measures formulas: the mean distance between their ranks and those of the target, 0 for the target alone.

    Args:
        target: formula.
        proxy: loss by the proxy from (loss, text).
        n: numbers that are ranked.
    """

    def __init__(
        self,
        target: str = TARGET,
        proxy: Callable[[float, str], float] = lambda loss, text: loss,
        n: int = 60,
    ) -> None:
        rng = np.random.default_rng(0)
        self._values = {
            "W": rng.normal(size=n),
            "G": rng.exponential(size=n) / 2,
            "X": rng.exponential(size=n),
        }
        self._proxy = proxy
        self._target = self._ranks(parse(target))

    def loss(self, formula: Formula) -> float | None:
        """None where the formula has no values, or only one."""
        ranks = None if formula.tree is None else self._ranks(formula.tree)
        return None if ranks is None else float(np.abs(ranks - self._target).mean() / len(ranks))

    def measure(self, proposal: Proposal) -> Measurement:
        formula, fidelity = proposal.candidate, proposal.fidelity
        loss = self.loss(formula)
        if loss is None:
            return Measurement(formula.text, fidelity, infeasible="Expected values, got none.")
        loss = (
            self._proxy(loss, formula.text) if fidelity.part == "proxy" else loss + 0.01 / fidelity.n_tokens
        )
        values = {"loss": loss, "nodes": float(formula.tree.size)}
        return Measurement(formula.text, fidelity, values, n_tokens=fidelity.total_tokens)

    def _ranks(self, tree: Tree) -> Any:
        with np.errstate(all="ignore"):
            scores = fold(tree, self._values.__getitem__, float, lambda name, args: _NUMPY[name](*args))
        scores = np.broadcast_to(scores, len(self._values["W"]))
        if not np.isfinite(scores).all() or np.ptp(scores) == 0:
            return None
        return np.argsort(np.argsort(scores, kind="stable"), kind="stable")


def noise(text: str) -> float:
    """Between 0 and 1, and always the same for a text."""
    return float(np.random.default_rng(list(text.encode())).random())


def search_formulas(
    controller: Controller, landscape: FormulaLandscape, n_evaluations: int, ask: int = 16
) -> list[Trial]:
    """Trials of a search until so many were no closed form, in order."""
    trials: list[Trial] = []
    while n_evaluations > 0 and (proposals := controller.ask(ask)):
        kept: list[Proposal] = []
        for proposal in proposals:
            n_evaluations -= proposal.fidelity.n_evaluations
            if n_evaluations >= 0:
                kept.append(proposal)
        told = [Trial(len(trials) + i, landscape.measure(proposal)) for i, proposal in enumerate(kept)]
        trials += told
        controller.tell(told)
    return trials


def best_of(trials: Sequence[Trial]) -> float:
    """The lowest loss at the largest fidelity."""
    return min(
        t.measurement.values["loss"]
        for t in trials
        if t.measurement.fidelity == FIDELITIES[-1] and t.measurement.infeasible is None
    )


class FormulaEvaluator:
    """The landscape for executors; counts what it was given."""

    def __init__(self, space: FormulaSpace, landscape: FormulaLandscape) -> None:
        self._space, self._landscape = space, landscape
        self.n_measured = 0

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        self.n_measured += len(candidates)
        return [self._landscape.measure(Proposal(self._space.parse(text), fidelity)) for text in candidates]
