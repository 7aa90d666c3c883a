"""Pruner of the space `masks`: KV groups and FFN channels cut by name, not by their rank."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.check_kept import check_parts
from secateur.pruners.models.cutting import LiveSublayer
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.pruner import Config, OnBlock, Pruner, no_report
from secateur.pruners.structure.method import StructureMethod, check_importance_on
from secateur.pruners.structure.pruner import ArchitecturePruner
from secateur.pruners.structure.reorder import cut_pieces
from secateur.pruners.structure.store import StructureKey, StructureStore, streamed
from secateur.spaces.architecture.candidate import KeptUnits


class MaskPruner(ArchitecturePruner):
    """Pruner of the space ``masks``.

    A search measures the inherited weights as they are. An export with sequential statistics repairs output
    projections block by block: the reformation of Search for Efficient LLMs (arXiv 2409.17372).
    """

    copies = True

    @classmethod
    def settled(cls, settings: Any, anatomy: Anatomy) -> Any:
        return settings

    @classmethod
    def check_config(cls, settings: Any, config: Any) -> None:
        """Formats are checked when a model is saved."""

    @classmethod
    def check_model(cls, settings: Any, anatomy: Anatomy) -> None:
        mixture = next((block.index for block in anatomy.blocks if block.mixture), None)
        if mixture is not None:
            raise ValueError(
                f"Expected a model without experts for the space masks, got a mixture at block {mixture}. Use the "
                f"space architecture."
            )
        check_importance_on(settings.importance, anatomy)
        check_parts(find_layouts(anatomy), "the space masks")

    @classmethod
    def held_of(cls, settings: Any, anatomy: Anatomy) -> Mapping[str, Any]:
        return {}

    @property
    def streamed(self) -> Mapping[str, Any]:
        return streamed(self._method, expert_channels=False)

    @property
    def _method(self) -> StructureMethod:
        return StructureMethod(self.settings.importance, ("none",), self.settings.dampening)

    def _key(self, calibration: str) -> StructureKey:
        return StructureKey(
            model=self.dense.fingerprint,
            dtype=self.dense.dtype,
            calibration=calibration,
            method=self._method,
            kv_groups=(),
            ffn=(),
        )

    def prepare(self, directory: Path, on_block: OnBlock = no_report) -> None:
        """Write the order of importance, with the weights in it."""
        self.prepare_blocks(directory, None, on_block)

    def baselines(self, directory: Path) -> Mapping[str, Any]:
        """Masks of the most important units, as many in each sub-layer."""
        store = StructureStore(directory, self.anatomy)
        orders = {
            (part.output.block, part.kind): store.ordered(part.output.block, part.kind).order
            for layout in store.layouts
            for part in layout.sublayers
        }
        found: Mapping[str, Any] = self.space.ranked_baselines(self.settings.importance, orders)
        return found

    def open(self, directory: Path) -> None:
        self._layouts = [layout.sublayers for layout in find_layouts(self.anatomy)]
        self._parts = [[LiveSublayer(part) for part in parts] for parts in self._layouts]
        self._whole = [tuple(tuple(range(part.n_units)) for part in parts) for parts in self._layouts]
        self._now: list[Any] = list(self._whole)

    def keys(self, config: Config) -> Sequence[Hashable]:
        """Numbers of the kept KV groups and channels, one pair a block."""
        return [(tuple(block["kv_groups"]), tuple(block["channels"])) for block in config["units"]]

    def apply(self, block: int, key: Hashable) -> None:
        """Cut the sub-layers whose units change."""
        assert isinstance(key, tuple)
        before = self._now[block]
        for layout, live, old, units in zip(
            self._layouts[block], self._parts[block], before, key, strict=True
        ):
            if units != old:
                _cut(layout, live, units)
        self._now[block] = key

    def release(self, block: int) -> None:
        self.apply(block, self._whole[block])

    def restore(self) -> None:
        for block in range(len(self._parts)):
            self.release(block)

    @torch.no_grad()
    def prune(self, config: Config, *, sequential: bool, on_block: OnBlock = no_report) -> None:
        repair = self.settings.repair if sequential else "none"
        method = StructureMethod(self.settings.importance, (repair,), self.settings.dampening)
        units, kept = [], self.keys(config)
        parts = stream_blocks(
            self.anatomy, self.calibration.tokens, outputs=method.repair_needs, sequential=sequential
        )
        for part, layout, key in zip(parts, find_layouts(self.anatomy), kept, strict=True):
            assert isinstance(key, tuple)
            for sub, chosen in zip(layout.sublayers, key, strict=True):
                if len(chosen) == sub.n_units:
                    continue
                inputs = part.outputs.get(sub.output.name)
                pieces = cut_pieces(sub, chosen, inputs, repair, self.settings.dampening)
                LiveSublayer(sub).cut(len(chosen), pieces)
                for parameter in (x for module in sub.modules for x in module.parameters(recurse=False)):
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            units.append(KeptUnits(*key))
            on_block(layout.block.index)
        self.units = tuple(units)

    def fitted(self, form: Mapping[str, Any]) -> Config:
        return Pruner.fitted(self, form)

    def record(self, config: Config) -> dict[str, Any]:
        of = self.settings
        return {"importance": of.importance, "repair": of.repair, "damp": of.dampening}


def _cut(layout: SublayerLayout, live: LiveSublayer, units: tuple[int, ...]) -> None:
    """Cut a sub-layer to these units, by reference to copies of the dense weights."""
    live.restore()
    if len(units) < layout.n_units:
        live.cut(len(units), cut_pieces(layout, units))
