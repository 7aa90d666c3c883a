"""Structured pruning of KV groups, FFN channels and sub-layers: views of a store in a search, a cut for good."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.depth.depth import depth_scores
from secateur.pruners.export.capability import (
    check_capability,
    check_carries,
    stock_kv_groups,
    stock_query_heads,
    stock_widths,
)
from secateur.pruners.export.export import ExportReport, check_structured, export_structured
from secateur.pruners.export.manifest import Manifest
from secateur.pruners.export.registry import FORMATS
from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.loading import LoadedModel
from secateur.pruners.models.memory import available_bytes
from secateur.pruners.models.narrow import LiveStream, Narrow
from secateur.pruners.models.shape import prunables
from secateur.pruners.pruner import Config, OnBlock, Pruner, no_report
from secateur.pruners.stores.block_files import is_built
from secateur.pruners.structure.hidden import HiddenOrder, hidden_order, order_bytes, read_order
from secateur.pruners.structure.method import StructureMethod, check_importance, check_importance_on
from secateur.pruners.structure.pruning import prune_structure
from secateur.pruners.structure.store import (
    StructureKey,
    StructureStore,
    build_structure,
    streamed,
    structure_bytes,
)
from secateur.spaces.architecture.candidate import Kept, KeptUnits, read_kept
from secateur.spaces.architecture.cost import cost
from secateur.spaces.methods import CUT_REPAIRS, DEPTH, IMPORTANCES
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import by_depth

HIDDEN = "hidden.safetensors"
"""File of the order of hidden channels that `ArchitecturePruner.prepare` writes."""

OBS_MATRICES = 6
"""Largest number of fp64 matrices, inputs by inputs, that optimal brain surgery holds at a time."""


class ArchitecturePruner(Pruner):
    """Pruner of the space ``architecture``: numbers of KV groups and FFN channels that each block keeps."""

    copies: ClassVar[bool] = False

    units: Sequence[KeptUnits] = ()
    """Units of each block that `prune` kept."""

    narrow: Narrow | None = None
    """Hidden channels that it kept; None: all."""

    _hidden: HiddenOrder | None = None
    _stream: LiveStream | None = None

    @classmethod
    def settled(cls, settings: Any, anatomy: Anatomy) -> Any:
        fits = bool(settings.rules.units & {"groups", "heads", "channels"}) and _has_room(anatomy)
        if settings.repair is None:
            settings = settings.model_copy(update={"repair": "obs" if fits else "none"})
        if settings.importance is None:
            updated = all(CUT_REPAIRS[name].gives in ("weight", "both") for name in settings.repairs)
            settings = settings.model_copy(update={"importance": "obs" if fits and updated else "wanda_sp"})
        return settings

    @classmethod
    def check_settings(cls, settings: Any) -> None:
        if settings.importance is not None:
            check_importance(settings.importance)

    @classmethod
    def is_smaller(cls, settings: Any) -> bool:
        return True

    @classmethod
    def check_config(cls, settings: Any, config: Any) -> None:
        check_carries(settings, config)

    @classmethod
    def check_model(cls, settings: Any, anatomy: Anatomy) -> None:
        check_capability(settings, anatomy)
        if settings.importance is not None:
            check_importance_on(settings.importance, anatomy)
        if "heads" in settings.rules.units and settings.importance is not None:
            StructureMethod(settings.importance, heads=True)

    @classmethod
    def by_blocks(cls, settings: Any) -> bool:
        named = settings.importance  # those that are chosen by themselves take none
        gradients = () if named is None else IMPORTANCES[named].gradients
        return settings.kind == "architecture" and not gradients and "hidden" not in settings.rules.units

    @classmethod
    def held_of(cls, settings: Any, anatomy: Anatomy) -> Mapping[str, Any]:
        return {
            "held_groups": stock_kv_groups(settings, anatomy),
            "held_queries": stock_query_heads(settings, anatomy),
            "widths": stock_widths(settings, anatomy),
        }

    keys_of_configs: ClassVar[bool] = True
    on_device: ClassVar[bool] = True

    def stored_bytes(self) -> int:
        key = self._key("")
        orders = order_bytes(self.anatomy, self._widths) if self._widths else 0
        return structure_bytes(self.anatomy, find_layouts(self.anatomy, experts=True), key) + orders

    @property
    def streamed(self) -> Mapping[str, Any]:
        return streamed(self._method, expert_channels="expert_channels" in self.settings.rules.units)

    @property
    def gradients(self) -> Sequence[Kind]:
        return self._method.gradients

    def _key(self, calibration: str) -> StructureKey:
        """Identity of the store that is built on calibration tokens of this hash."""
        of, levels = self.settings, self.space.levels
        repaired = of.repairs != ("none",)  # without a repair every number is a level
        return StructureKey(
            model=self.dense.fingerprint,
            dtype=self.dense.dtype,
            calibration=calibration,
            method=self._method,
            kv_groups=_union(block.kv_groups for block in levels) if repaired else (),
            ffn=_union(block.ffn for block in levels) if repaired else (),
            queries=_union(block.queries for block in levels)[1:] if repaired else (),
            expert_channels="expert_channels" in of.rules.units,
            shared=_union(block.shared for block in levels)[1:] if repaired else (),
        )

    @property
    def independent_blocks(self) -> bool:
        return not self.gradients

    def prepare_blocks(
        self,
        directory: Path,
        blocks: Collection[int] | None,
        on_block: OnBlock = no_report,
    ) -> None:
        """See `Pruner.prepare_blocks`; None: all, and the store is finished."""
        key = self._key(self.calibration.sha256)
        if not is_built(directory, key):
            of = self.calibration
            build_structure(
                directory,
                self.anatomy,
                of.tokens,
                key,
                contrast=of.contrast,
                on_block=on_block,
                only=blocks,
            )

    def prepare(self, directory: Path, on_block: OnBlock = no_report) -> None:
        self.prepare_blocks(directory, None, on_block)
        if self._widths:
            identity = f"{self.dense.fingerprint} {self.dense.dtype} {self.calibration.sha256}"
            hidden_order(self.anatomy, self.calibration.tokens, self._widths, directory / HIDDEN, identity)

    @property
    def _widths(self) -> tuple[int, ...]:
        """Numbers of hidden channels that candidates may keep, fewer than all."""
        return tuple(x.width for x in self.dense.shape.narrower)

    @property
    def _method(self) -> StructureMethod:
        """Without an importance of experts where the model has none; with one of query heads where they are cut."""
        splits = any(len(block.queries) > 1 for block in self.space.levels) if self.space else False
        method = replace(_method_of(self.settings), heads=splits)
        return method if any(block.mixture for block in self.anatomy.blocks) else replace(method, experts="")

    def open(self, directory: Path) -> None:
        self._store = StructureStore(directory, self.anatomy)
        self._dense = tuple((block.whole, "none") for block in self.anatomy.blocks)
        self._now: list[Hashable] = list(self._dense)
        self._hidden = read_order(directory / HIDDEN, self.anatomy, self._widths) if self._widths else None
        self._stream = LiveStream(self.anatomy) if self._widths else None

    def keys(self, config: Config) -> Sequence[Hashable]:
        """Pairs of kept units and repair, one a block; ``none`` where nothing is left to repair.

        With fewer hidden channels than all their number is the third.
        """
        repair = config["repair"]
        hidden = (config["hidden"],) if config.get("hidden") else ()
        return [
            (kept, repair if _repairable(block, kept) else "none", *hidden)
            for block, kept in zip(self.anatomy.blocks, read_kept(config), strict=True)
        ]

    def apply(self, block: int, key: Hashable) -> None:
        """Cut the block, unless it has this key."""
        if self._now[block] != key:
            assert isinstance(key, tuple)
            self._store.cut(block, *key[:2])
            self._narrow(block, key)
            self._now[block] = key

    def finish(self, key: Hashable) -> None:
        self._narrow(len(self.anatomy.blocks), key)

    def _narrow(self, block: int, key: Hashable) -> None:
        """Narrow the stream in a block, or behind the last one, as its key says."""
        assert isinstance(key, tuple)
        if self._stream is None or self._hidden is None:
            return
        if len(key) > 2:
            self._stream.narrow_block(block, self._hidden.at(key[2]))
        else:
            self._stream.restore_part(block)

    def weights_of(self, block: int, key: Hashable) -> Mapping[str, Tensor]:
        assert isinstance(key, tuple)
        return self._store.outputs(block, *key[:2])

    def restore(self) -> None:
        self._store.restore()
        if self._stream is not None:
            self._stream.restore()
        self._now = list(self._dense)

    def baselines(self, directory: Path) -> Mapping[str, Any]:
        """Architectures that known allocations give, from scores in the store or beside it."""
        mixed = any(block.mixture for block in self.anatomy.blocks)  # FLAP has no scores of experts
        kinds = [kind for kind in self.settings.scored if not (mixed and kind == "flap")]
        if not kinds:
            return {}
        scores = StructureStore(directory, self.anatomy).scores
        blocks = depth_scores(
            [kind for kind in kinds if kind in DEPTH],
            self.anatomy,
            self.calibration.tokens,
            directory,
            f"{self.dense.fingerprint} {self.calibration.sha256}",
            scores.influence,
        )
        found: dict[str, Any] = self.space.scored_baselines(kinds, replace(scores, blocks=blocks))
        return found

    def prune(self, config: Config, *, sequential: bool, on_block: OnBlock = no_report) -> None:
        """Cut the live model, see `prune_structure`; hidden channels are masked, and left out when it is saved."""
        if config.get("hidden"):
            order = hidden_order(self.anatomy, self.calibration.tokens, (config["hidden"],))
            self.narrow = order.at(config["hidden"])
        self.units = prune_structure(
            self.anatomy,
            read_kept(config),
            importance=self.settings.importance,
            repair=config["repair"],
            dampening=self.settings.dampening,
            experts=self.settings.expert_importance,
            tokens=self.calibration.tokens,
            contrast=self.calibration.contrast,
            sequential=sequential,
            on_block=on_block,
        )
        if self.narrow is not None:
            stream = LiveStream(self.anatomy)
            for block in range(len(self.anatomy.blocks) + 1):
                stream.narrow_block(block, self.narrow)

    def fitted(self, form: Mapping[str, Any]) -> Config:
        """Kept shares of units of the block at the same relative depth, to the nearest number of units.

        A sub-layer that keeps a share keeps at least one unit, and the first block a KV group; numbers of channels are
        multiples of the settings' `multiple_of`. Of a form ``{"uniform": share}`` the uniform candidate of that target,
        in the space of the settings.
        """
        if "uniform" in form:
            settings = self.settings.model_copy(update={"target": form["uniform"]})
            space: Any = SPACES[settings.kind].build(settings, prunables(self.anatomy), self.dense.shape)
            return dict(space.config(space.uniform(0)))
        blocks = []
        rows = by_depth(form["blocks"], len(self.anatomy.blocks))
        for block, row in zip(self.anatomy.blocks, rows, strict=True):
            whole = self.dense.shape.blocks[block.index].rigid
            groups = _share(row["kv_groups"], block.attention_units, block.attention_units if whole else 1)
            multiple = self.settings.multiple_of if block.mixture is None else block.mixture.n_groups
            ffn = _share(row["ffn"], block.ffn_units, multiple)
            inside = _inside(row, block) if ffn else (0, 0)
            kept = Kept(max(groups, int(block.index == 0)), ffn, _queries(row, block), *inside)
            blocks.append(kept.plain)
        return {"blocks": blocks, "repair": form["repair"]}

    def costs_of(self, config: Config) -> Mapping[str, float]:
        return cost(self.dense.shape, read_kept(config), config["repair"], config.get("hidden", 0))

    @classmethod
    def formats(cls, settings: Any) -> tuple[str, ...]:
        return tuple(FORMATS)

    def check_format(self, config: Config, tokenizer: PreTrainedTokenizerBase, form: str) -> None:
        hidden = config.get("hidden")
        narrow = Narrow(tuple(range(hidden)), {}) if hidden else None
        check_structured(self.anatomy, tokenizer, read_kept(config), form, narrow)

    def record(self, config: Config) -> dict[str, Any]:
        of = self.settings
        record = {"importance": of.importance, "repair": config["repair"], "damp": of.dampening}
        return record | ({"expert_importance": self._method.experts} if self._method.experts else {})

    def asked(self, config: Config) -> dict[str, Any]:
        return {"asked": {}, "kept": config["blocks"]}

    def save(
        self,
        loaded: LoadedModel,
        config: Config,
        to: Path,
        manifest: Manifest,
        check_tokens: Int64[Tensor, "rows length"],
    ) -> ExportReport:
        """See `export_structured`, also for what is raised."""
        return export_structured(
            self.anatomy,
            loaded.tokenizer,
            read_kept(config),
            manifest,
            to,
            check_tokens=check_tokens,
            dtype=loaded.stored_dtype,
            units=self.units,
            narrow=self.narrow,
        )


def _method_of(settings: Any) -> StructureMethod:
    return StructureMethod(
        settings.importance, settings.repairs, settings.dampening, settings.expert_importance
    )


def _share(kept: str, n_units: int, multiple: int) -> int:
    """Number of units nearest to a share such as ``2/3``: a multiple; none for 0, all for 1."""
    share = Fraction(kept)
    if share in (0, 1):
        return int(share * n_units)
    return min(max(round(share * n_units / multiple), 1) * multiple, n_units)


def _queries(row: Mapping[str, Any], block: Block) -> int:
    """Number of query heads of each group nearest to a share such as ``2/3``; 0: all, or none to cut."""
    per_group = block.n_heads // max(block.attention_units, 1)
    kept = max(round(Fraction(row.get("queries", "1")) * per_group), 1)
    return kept if kept < per_group and Fraction(row["kv_groups"]) else 0


def _inside(row: Mapping[str, Any], block: Block) -> tuple[int, int]:
    """Channels of each routed expert and of shared ones nearest to shares such as ``2/3``; 0: all, or none to cut."""
    if block.mixture is None:
        return 0, 0
    found = []
    for name, n_units in (("channels", block.mixture.n_channels), ("shared", block.shared_channels)):
        n_kept = max(round(Fraction(row.get(name, "1")) * n_units), 1)
        found.append(n_kept if n_kept < n_units else 0)
    return found[0], found[1]


def _union(levels: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted({number for block in levels for number in block}))


def _has_room(anatomy: Anatomy) -> bool:
    """True if `obs_order` and `obs_update` fit into the device's memory, where that is known."""
    widest = max(linear.in_features for linear in anatomy.linears)
    left = available_bytes(anatomy.embedding.weight.device)
    return left is None or left > OBS_MATRICES * 8 * widest**2


def _repairable(block: Block, kept: Kept) -> bool:
    """True if a sub-layer lost a part: one that is whole or removed needs no repair."""
    return (
        bool(kept.queries or kept.shared)
        or 0 < kept.kv_groups < block.attention_units
        or 0 < kept.ffn < block.ffn_units
    )
