"""Unstructured pruning by a formula: scored once over the whole model, switched block by block by its masks."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.stream import walks
from secateur.pruners.formulas.evaluate import FormulaError
from secateur.pruners.formulas.terminals import kinds_of
from secateur.pruners.models.shape import prunables
from secateur.pruners.pruner import Config, InfeasibleError, OnBlock, no_report
from secateur.pruners.stores.recent import Recent
from secateur.pruners.weights import formula_store
from secateur.pruners.weights.formula_layers import FormulaLayers
from secateur.pruners.weights.formula_overlap import overlaps
from secateur.pruners.weights.formula_proxy import FormulaProxy, grams_of
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import WeightPruner
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.formulas.tree import Tree
from secateur.spaces.shape import split_protected

MASK_BYTES = 1 << 30
"""Size of the cache of masks."""


class FormulaPruner(WeightPruner):
    """Pruner of the space ``formula``: all projections at one sparsity, by an expression as the metric.

    A formula whose masks of a few probed rows equal those of an earlier one counts as that one: nothing is scored or
    measured again.
    """

    described: ClassVar[str] = "masks"

    def stored_bytes(self) -> int:
        names, grams = self.space.terminals, grams_of(self.settings, len(self.anatomy.blocks))
        outputs = formula_store.output_bytes(self.anatomy, grams) if self._by_curvature else 0
        return formula_store.terminal_bytes(self.anatomy, names, grams) + outputs

    @property
    def streamed(self) -> Mapping[str, Any]:
        grams = grams_of(self.settings, len(self.anatomy.blocks))
        return formula_store.streamed(self.anatomy, self.space.terminals, grams)

    @property
    def gradients(self) -> Sequence[Kind]:
        return kinds_of(self.space.terminals)

    @property
    def independent_blocks(self) -> bool:
        return walks(**self.streamed)

    def prepare_blocks(self, directory: Path, blocks: Collection[int], on_block: OnBlock = no_report) -> None:
        self._build(directory, blocks, on_block)

    def prepare(self, directory: Path, on_block: OnBlock = no_report) -> None:
        self._build(directory, None, on_block)

    def _build(self, directory: Path, only: Collection[int] | None, on_block: OnBlock) -> None:
        names, dampening = self.space.terminals, self.settings.dampening
        identity = formula_store.identity_of(self.dense.fingerprint, self.calibration.sha256, str(dampening))
        grams = grams_of(self.settings, len(self.anatomy.blocks))
        if self._by_curvature and only is None:
            formula_store.build_outputs(directory, self.anatomy, self.calibration.tokens, identity, grams)
        if not formula_store.is_built(directory, names, identity, grams):
            formula_store.build_terminals(
                directory,
                self.anatomy,
                self.calibration.tokens,
                names,
                identity,
                dampening=dampening,
                grams=grams,
                contrast=self.calibration.contrast,
                on_block=on_block,
                only=only,
            )

    def open(self, directory: Path) -> None:
        of = self.settings
        store = formula_store.TerminalStore(directory, self.anatomy, self.space.terminals)
        self._directory = directory
        self.layers = FormulaLayers(self.anatomy, store, comparison=of.comparison, group_size=of.group_size)
        self._keys: dict[str, Sequence[str]] = {}  # of each block, by fingerprint
        self._masks = Recent[dict[str, Tensor]](MASK_BYTES)
        self._sources: dict[tuple[int, str], tuple[Tree, Mapping[str, float]]] = {}
        self._now = [""] * len(self.anatomy.blocks)

    def keys(self, config: Config) -> Sequence[Hashable]:
        """Hashes of the masks, one a block."""
        if not config["metric"]:
            return [""] * len(self.anatomy.blocks)
        try:
            formula, digest = self.layers.marked(config)
            if digest not in self._keys:
                self._keys[digest] = self._scored(formula, config["sparsity"])
        except FormulaError as error:
            raise InfeasibleError(str(error)) from None
        return self._keys[digest]

    def apply(self, block: int, key: Hashable) -> None:
        """Point the projections of a block to their masked weights."""
        assert isinstance(key, str)
        if self._now[block] == key:
            return
        masks = self._masks.get((block, key), lambda: self._recomputed(block, key)) if key else {}
        for linear in self.anatomy.blocks[block].linears:
            dense = self.layers.dense[linear.name]
            linear.point_to(dense * masks[linear.name] if linear.name in masks else dense)
        self._now[block] = key

    def release(self, block: int) -> None:
        self.apply(block, "")

    def restore(self) -> None:
        for block in range(len(self._now)):
            self.release(block)

    def _scored(self, formula: Tree, sparsity: Mapping[str, float]) -> Sequence[str]:
        """Keys of the blocks; their masks are kept as long as there is room."""
        keys = []
        for block in self.anatomy.blocks:
            masks = self.layers.masks(block.index, formula, sparsity)
            digest = hashlib.sha256()
            for kept in masks.values():
                digest.update(np.packbits(kept.cpu().numpy()).data)
            key = digest.hexdigest()[:32]
            self._sources[block.index, key] = formula, sparsity
            self._masks.put((block.index, key), masks)
            keys.append(key)
        return keys

    def _recomputed(self, block: int, key: str) -> dict[str, Tensor]:
        return self.layers.masks(block, *self._sources[block, key])

    @cached_property
    def proxy(self) -> FormulaProxy:
        grams = grams_of(self.settings, len(self.anatomy.blocks))
        assert grams is not None, "the settings say whether there is a proxy"
        outputs = formula_store.load_outputs(self._directory, grams) if self._by_curvature else None
        return FormulaProxy(self.layers, grams, self.settings.proxy.rows, outputs)

    @property
    def _by_curvature(self) -> bool:
        return self.settings.proxy is not None and self.settings.proxy.by == "curvature"

    def proxy_loss(self, config: Config) -> float:
        """Error of the masks or loss that is foretold, see `FormulaProxy`."""
        try:
            return self.proxy.loss(config)
        except FormulaError as error:
            raise InfeasibleError(str(error)) from None

    def describe(self, directory: Path, candidates: Sequence[str]) -> dict[str, Any]:
        """See `overlaps`."""
        self.open(directory)
        return overlaps(self.layers, self.space, candidates)

    def fitted(self, form: Mapping[str, Any]) -> Config:
        """The formula at the sparsity of the settings, for all linears that they do not protect."""
        free, _ = split_protected(prunables(self.anatomy), self.settings.protect)
        sparsity = dict.fromkeys((linear.name for linear in self.anatomy.linears), 0.0)
        sparsity |= dict.fromkeys((linear.name for linear in free), self.settings.target)
        return {"metric": form["metric"], "sparsity": sparsity}

    def method(self, config: Config) -> Method:
        of, metric = self.settings, config["metric"]
        return Method(
            name=metric or "magnitude",
            comparison=of.comparison,
            group_size=of.group_size,
            dampening=of.dampening,
            formula=formula_of(metric) if metric else None,
        )
