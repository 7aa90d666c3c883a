"""The projections of a dense model as formulas see them: what they are made of, fingerprints, masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.pruners.formulas.evaluate import FormulaError, scores
from secateur.pruners.formulas.fingerprint import fingerprint
from secateur.pruners.formulas.probe import Probe, probe_of
from secateur.pruners.formulas.terminals import Terminals
from secateur.pruners.masks import mask
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.weights.formula_store import TerminalStore
from secateur.spaces.formulas.tree import Tree
from secateur.spaces.methods import Comparison

PROBES_A_MODEL = 4
LEVELS = (0.3, 0.7)
"""Beside the target, where the fingerprints of formulas are compared."""


class FormulaLayers:
    """The dense weights and the statistics of a model, whatever its projections point to meanwhile.

    Args:
        anatomy: the live model, dense now.
        store: what formulas are made of.
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
        self._probes: list[Probe] | None = None

    def terminals(self, linear: Linear) -> Terminals:
        """What formulas may use of a projection."""
        now = linear.weight
        linear.point_to(self.dense[linear.name])
        try:
            return self.store.terminals(linear)
        finally:
            linear.point_to(now)

    def fingerprint(self, program: Tree, target: float) -> str:
        """Equal for formulas that prune some rows of layers spread over the model alike; see `fingerprint`.

        Raises:
            FormulaError: if the formula is undefined there, or ranks nothing by the weights.
        """
        if self._probes is None:
            linears = list(self.anatomy.linears)
            places = torch.linspace(0, len(linears) - 1, min(PROBES_A_MODEL, len(linears))).long().tolist()
            self._probes = [probe_of(self.terminals(linears[place])) for place in places]
        found = fingerprint(
            program,
            self._probes,
            sorted({*LEVELS, target}),
            comparison=self.comparison,
            group_size=self.group_size,
        )
        if found.reason:
            raise FormulaError(found.reason)
        return found.digest

    def masks(self, block: int, program: Tree, wanted: Mapping[str, float]) -> dict[str, Tensor]:
        """True = keep, for each projection of the block that is pruned.

        Args:
            block: its index.
            program: a formula.
            wanted: sparsity by the projection's full name.

        Raises:
            FormulaError: if the formula gives no ranking of a projection.
        """
        pruned = [linear for linear in self.anatomy.blocks[block].linears if wanted[linear.name] > 0]
        return {
            linear.name: self.mask(program, self.terminals(linear), wanted[linear.name], linear.name)
            for linear in pruned
        }

    def mask(self, program: Tree, terminals: Terminals, sparsity: float, name: str) -> Tensor:
        """True = keep, for the rows of a projection that the terminals are of."""
        n_out, n_in = terminals["W"].shape
        score = scores(
            program,
            terminals,
            (n_out, n_in),
            comparison=self.comparison,
            group_size=self.group_size,
            name=name,
        )
        return mask(score, sparsity, comparison=self.comparison, group_size=self.group_size, name=name)
