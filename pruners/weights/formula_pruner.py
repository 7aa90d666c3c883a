"""How a formula turns into weights: scored once over the whole model, then switched block by block by its masks."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from secateur.pruners.formulas.evaluate import FormulaError
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.stores.recent import Recent
from secateur.pruners.switching import InfeasibleError
from secateur.pruners.weights.formula_layers import FormulaLayers, Programs
from secateur.spaces.formulas.tree import Tree

MASK_BYTES = 1 << 30
"""Masks of formulas are kept up to so many bytes, those used last."""


class FormulaSwitcher:
    """Switches projections to what a formula leaves of them.

    A formula that prunes the probes as an earlier one did counts as that one: nothing is scored or measured again.

    Args:
        anatomy: the live, dense model.
        layers: its projections.
        programs: from the name of a metric to its formula.
    """

    def __init__(self, anatomy: Anatomy, layers: FormulaLayers, programs: Programs) -> None:
        self._anatomy = anatomy
        self._layers = layers
        self._programs = programs
        self._keys: dict[str, tuple[str, ...]] = {}  # of each block, by fingerprint
        self._masks = Recent[dict[str, Tensor]](MASK_BYTES)
        self._sources: dict[tuple[int, str], tuple[Tree, dict[str, float]]] = {}
        self._now = [""] * len(anatomy.blocks)

    def keys(self, config: Mapping[str, Any]) -> Sequence[Hashable]:
        """A hash of each block's masks.

        Raises:
            InfeasibleError: if the formula gives no ranking of some layer, with the reason.
        """
        metric, sparsity = config["metric"], config["sparsity"]
        if not metric:
            return [""] * len(self._anatomy.blocks)
        program = self._programs(metric)
        try:
            digest = self._layers.fingerprint(program, max(sparsity.values()))
            if digest not in self._keys:
                self._keys[digest] = tuple(self._scored(program, sparsity))
        except FormulaError as error:
            raise InfeasibleError(str(error)) from None
        return self._keys[digest]

    def apply(self, block: int, key: Hashable) -> None:
        """Point the projections of a block to their masked weights."""
        assert isinstance(key, str)
        if self._now[block] == key:
            return
        masks = self._masks.get((block, key), lambda: self._made_again(block, key)) if key else {}
        for linear in self._anatomy.blocks[block].linears:
            dense = self._layers.dense[linear.name]
            linear.point_to(dense * masks[linear.name] if linear.name in masks else dense)
        self._now[block] = key

    def release(self, block: int) -> None:
        """See `Copies.release`."""
        self.apply(block, "")

    def restore(self) -> None:
        """All projections back to their dense weights."""
        for block in range(len(self._now)):
            self.release(block)

    def _scored(self, program: Tree, sparsity: Mapping[str, float]) -> Sequence[str]:
        """The key of each block; its masks are kept as long as there is room."""
        keys = []
        for block in self._anatomy.blocks:
            wanted = {x.name: sparsity.get(x.name, 0.0) for x in block.linears}
            masks = self._layers.masks(block.index, program, wanted)
            digest = hashlib.sha256()
            for kept in masks.values():
                digest.update(np.packbits(kept.cpu().numpy()).data)
            key = digest.hexdigest()[:32]
            self._sources[block.index, key] = program, wanted
            self._masks.put((block.index, key), masks)
            keys.append(key)
        return keys

    def _made_again(self, block: int, key: str) -> dict[str, Tensor]:
        return self._layers.masks(block, *self._sources[block, key])
