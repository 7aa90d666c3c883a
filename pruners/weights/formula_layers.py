"""Projections of a dense model under formulas: their terminals, fingerprints and masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.formulas.evaluate import scores
from secateur.pruners.formulas.fingerprint import fingerprint, probe_of
from secateur.pruners.formulas.terminals import Terminals
from secateur.pruners.masks import mask
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.weights.formula_store import TerminalStore
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.formulas.tree import Tree
from secateur.spaces.method import Comparison

PROBES_A_MODEL = 4
LEVELS = (0.3, 0.7)
"""Sparsities, beside the target, at which fingerprints compare formulas."""


class FormulaLayers:
    """Dense weights and statistics of a model, whatever its projections point to.

    Args:
        anatomy: the live model, dense now.
        store: of the terminals.
        comparison, group_size: who competes with whom.
    """

    def __init__(
        self, anatomy: Anatomy, store: TerminalStore, *, comparison: Comparison, group_size: int | None
    ) -> None:
        self.anatomy = anatomy
        self.store = store
        self.comparison: Comparison = comparison
        self.group_size = group_size
        self.dense = {linear.name: linear.weight for linear in anatomy.linears}
        self._probes: list[Terminals] = []

    def terminals(self, linear: Linear) -> Terminals:
        """Terminals of a dense projection."""
        return self.store.terminals(linear, self.dense[linear.name])

    def marked(self, config: Mapping[str, Any]) -> tuple[Tree, str]:
        """The formula of a candidate's configuration, with its fingerprint; errors as of `fingerprint`."""
        formula = formula_of(config["metric"])
        assert formula is not None, "a candidate is a formula"
        return formula, self.fingerprint(formula, max(config["sparsity"].values()))

    def fingerprint(self, formula: Tree, target: float) -> str:
        """Fingerprint of a formula on some rows of layers spread over the model; see `fingerprint.fingerprint`.

        Raises:
            FormulaError: if the formula is undefined there, or ranks nothing by the weights.
        """
        if not self._probes:
            linears = list(self.anatomy.linears)
            places = torch.linspace(0, len(linears) - 1, min(PROBES_A_MODEL, len(linears))).long().tolist()
            self._probes = [probe_of(self.terminals(linears[place])) for place in places]
        rule: dict[str, Any] = {"comparison": self.comparison, "group_size": self.group_size}
        return fingerprint(formula, self._probes, sorted({*LEVELS, target}), **rule)

    def masks(self, block: int, formula: Tree, sparsity: Mapping[str, float]) -> dict[str, Tensor]:
        """Masks (True = keep) of the projections of a block that are pruned.

        Args:
            block: its index.
            formula: the metric.
            sparsity: by the projection's full name; a projection without an entry is not pruned.

        Raises:
            FormulaError: if the formula gives no ranking of a projection.
        """
        return {
            linear.name: self.mask(formula, self.terminals(linear), sparsity[linear.name], linear.name)
            for linear in self.anatomy.blocks[block].linears
            if sparsity.get(linear.name, 0.0) > 0
        }

    def mask(self, formula: Tree, terminals: Terminals, sparsity: float, name: str) -> Tensor:
        """Mask (True = keep) of the rows of a projection that the terminals belong to."""
        rule: dict[str, Any] = {"comparison": self.comparison, "group_size": self.group_size, "name": name}
        return mask(scores(formula, terminals, (*terminals["W"].shape,), **rule), sparsity, **rule)
