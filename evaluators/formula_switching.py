"""How a formula turns into weights: scored once over the whole model, then switched block by block by its masks."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.evaluators.switching import InfeasibleError
from secateur.pruners.families.anatomy import Anatomy, Linear
from secateur.pruners.formulas.errors import FormulaError
from secateur.pruners.formulas.evaluate import scores
from secateur.pruners.formulas.fingerprint import fingerprint
from secateur.pruners.formulas.probe import Probe, probe_of
from secateur.pruners.formulas.program import Program
from secateur.pruners.formulas.store import TerminalStore
from secateur.pruners.masks import Comparison, mask

MASK_BYTES = 1 << 30
"""Masks of formulas are kept up to so many bytes, those used last."""

PROBES_A_MODEL = 4
LEVELS = (0.3, 0.7)
"""Beside the target, where the fingerprints of formulas are compared."""


class FormulaSwitcher:
    """Switches projections to what a formula leaves of them.

    A formula that prunes the probes as an earlier one did counts as that one: nothing is scored or measured again.

    Args:
        anatomy: the live, dense model.
        store: what formulas are made of.
        programs: from the name of a metric to plain data.
        comparison, group_size: who competes with whom.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        store: TerminalStore,
        programs: Any,
        *,
        comparison: Comparison,
        group_size: int | None,
    ) -> None:
        self._anatomy = anatomy
        self._store = store
        self._programs = programs
        self._comparison: Comparison = comparison
        self._group_size = group_size
        self._dense = {linear.name: linear.weight for linear in anatomy.linears}
        self._keys: dict[str, tuple[str, ...]] = {}  # of each block, by fingerprint
        self._masks: OrderedDict[tuple[int, str], dict[str, Tensor]] = OrderedDict()
        self._sources: dict[tuple[int, str], tuple[Program, dict[str, float]]] = {}
        self._bytes = 0
        self._now = [""] * len(anatomy.blocks)
        self._probes: list[Probe] | None = None

    def keys(self, config: Mapping[str, Any]) -> Sequence[Hashable]:
        """A hash of each block's masks.

        Raises:
            InfeasibleError: if the formula gives no ranking of some layer, with the reason.
        """
        metric, sparsity = config["metric"], config["sparsity"]
        if not metric:
            return [""] * len(self._anatomy.blocks)
        program = self._programs(metric)
        target = max(sparsity.values())
        found = fingerprint(
            program,
            self._some_probes(),
            sorted({*LEVELS, target}),
            comparison=self._comparison,
            group_size=self._group_size,
        )
        if found.reason:
            raise InfeasibleError(found.reason)
        if found.digest not in self._keys:
            try:
                self._keys[found.digest] = tuple(self._scored(program, sparsity))
            except FormulaError as error:
                raise InfeasibleError(str(error)) from None
        return self._keys[found.digest]

    def apply(self, block: int, key: Hashable) -> None:
        """Point the projections of a block to their masked weights."""
        assert isinstance(key, str)
        if self._now[block] == key:
            return
        masks = self._masks_of(block, key) if key else {}
        for linear in self._anatomy.blocks[block].linears:
            dense = self._dense[linear.name]
            linear.point_to(dense * masks[linear.name] if linear.name in masks else dense)
        self._now[block] = key

    def restore(self) -> None:
        """All projections back to their dense weights."""
        for block in range(len(self._now)):
            self.apply(block, "")

    def _some_probes(self) -> list[Probe]:
        """Layers spread over the model."""
        if self._probes is None:
            linears = list(self._anatomy.linears)
            places = torch.linspace(0, len(linears) - 1, min(PROBES_A_MODEL, len(linears))).long().tolist()
            self._probes = [probe_of(self._terminals(linears[place])) for place in places]
        return self._probes

    def _terminals(self, linear: Linear) -> Any:
        now = linear.weight
        linear.point_to(self._dense[linear.name])
        try:
            return self._store.terminals(linear)
        finally:
            linear.point_to(now)

    def _scored(self, program: Program, sparsity: Mapping[str, float]) -> Sequence[str]:
        """The key of each block; its masks are kept as long as there is room."""
        keys = []
        for block in self._anatomy.blocks:
            wanted = {x.name: sparsity.get(x.name, 0.0) for x in block.linears}
            masks = self._block_masks(block.index, program, wanted)
            digest = hashlib.sha256()
            for kept in masks.values():
                digest.update(kept.cpu().numpy().tobytes())
            key = digest.hexdigest()[:32]
            self._sources[block.index, key] = program, wanted
            self._keep(block.index, key, masks)
            keys.append(key)
        return keys

    def _masks_of(self, block: int, key: str) -> dict[str, Tensor]:
        if (block, key) not in self._masks:
            self._keep(block, key, self._block_masks(block, *self._sources[block, key]))
        self._masks.move_to_end((block, key))
        return self._masks[block, key]

    def _keep(self, block: int, key: str, masks: dict[str, Tensor]) -> None:
        if (block, key) in self._masks:
            return
        self._masks[block, key] = masks
        self._bytes += sum(kept.nbytes for kept in masks.values())
        while self._bytes > MASK_BYTES and len(self._masks) > 1:
            _, oldest = self._masks.popitem(last=False)
            self._bytes -= sum(kept.nbytes for kept in oldest.values())

    def _block_masks(self, block: int, program: Program, wanted: Mapping[str, float]) -> dict[str, Tensor]:
        """True = keep, for each projection that is pruned."""
        masks = {}
        for linear in self._anatomy.blocks[block].linears:
            level = wanted[linear.name]
            if level > 0:
                score = scores(
                    program,
                    self._terminals(linear),
                    (linear.out_features, linear.in_features),
                    comparison=self._comparison,
                    group_size=self._group_size,
                    name=linear.name,
                )
                masks[linear.name] = mask(
                    score, level, comparison=self._comparison, group_size=self._group_size, name=linear.name
                )
        return masks
