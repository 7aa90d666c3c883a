"""Pruner of recipes: planned over the whole dense model, then carried out block by block."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.pruners.blockwise import BlockwisePruning
from secateur.pruners.calibration.block_statistics import build_block_statistics
from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.choose import choose
from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.pool import (
    Pool,
    build_pools,
    load_pools,
    pool_bytes,
    pool_identity,
    save_pools,
)
from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.export import ExportReport, check_structured, export_structured
from secateur.pruners.export.manifest import Manifest
from secateur.pruners.export.registry import FORMATS
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.loading import LoadedModel
from secateur.pruners.models.mapped import NotStreamedError
from secateur.pruners.models.narrow import LiveStream, Narrow
from secateur.pruners.pruner import Config, OnBlock, Pruner, no_report
from secateur.pruners.recipes.allocation.layers import Profile
from secateur.pruners.recipes.allocation.profile import read_profile
from secateur.pruners.recipes.baseline_statistics import BaselineStatistics
from secateur.pruners.recipes.checks import (
    check_family,
    check_names,
    check_second,
    check_statistics,
    statistics_of,
)
from secateur.pruners.recipes.context import RecipeContext
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan
from secateur.pruners.recipes.plans import Plans
from secateur.pruners.recipes.proxy import RecipeProxy, build_proxy, proxy_blocks, proxy_bytes
from secateur.pruners.recipes.weights import weights_by_block
from secateur.pruners.stores.worker_store import WorkerStore
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.recipe.schedule import computed_tokens, untrained

POOLS, PROFILE = "pools.safetensors", "profile.yaml"
"""Files that `RecipePruner.prepare` writes."""

STATISTICS = ".statistics"
"""Directory of the cache of statistics. Hidden: each node fills its own, it is not staged to others."""


class RecipePruner(Pruner):
    """Pruner of the space ``recipe``: calibration data, metric, allocation and repair together.

    All statistics are those of the dense model, and the pruned weights of a block depend on the recipe alone.

    Its settings are those of the space or of a recipe file: `unit`, `dampening`, `protect`, `profile`, `pool_tokens`,
    `choose` and `cache_gb` are used.
    """

    _plans: Plans | None = None
    _earlier: Path | None = None
    _proxy: RecipeProxy | None = None

    @classmethod
    def check_settings(cls, settings: Any) -> None:
        check_names(settings)

    @classmethod
    def check_model(cls, settings: Any, anatomy: Anatomy) -> None:
        check_family(settings, anatomy)
        check_statistics(settings, anatomy)

    def check_calibration(self) -> None:
        check_second(self.settings, self.calibration.sources)
        pools = build_pools(self.anatomy, self._tokens, look=False)
        for recipe in self.space.baselines().values():
            calibration = self.space.config(recipe)["calibration"]
            if calibration["choose"] == "random":
                choose(pools, calibration, self.seed)

    @classmethod
    def is_smaller(cls, settings: Any) -> bool:
        unit: str = settings.unit
        return unit != "weights"

    def stored_bytes(self) -> int:
        """Upper bound of the disk of pools and statistics; the cache is smaller where few statistics are asked for."""
        of = self.settings
        pools = pool_bytes(self.anatomy, len(of.texts) * of.pool_tokens, look=self._look)
        if of.proxy is None:
            return pools
        return pools + proxy_bytes(self.anatomy, self._proxy_blocks, self.calibration.tokens.shape[1])

    @property
    def statistics(self) -> tuple[Mapping[str, Any], Sequence[Kind]]:
        """Statistics that the recipes of the baselines take: of one walk, and kinds of gradients."""
        return statistics_of(self.settings.unit, self._baseline_forms)

    @property
    def _baseline_forms(self) -> list[Config]:
        return [self.space.config(x) for name, x in self.space.baselines().items() if name != "dense"]

    def prepare(self, directory: Path, on_block: OnBlock = no_report) -> None:
        """Write the pools, unless they are there, and the profile."""
        self._prepare_pools(directory, on_block)
        if self.settings.profile is not None:
            shutil.copyfile(self.settings.profile, directory / PROFILE)
        if self.settings.proxy is not None:
            tokens, identity = self.calibration.tokens, f"{self._model} {self.calibration.sha256}"
            build_proxy(directory, self.anatomy, tokens, identity, self._proxy_blocks, self.seed)
        if self._cache_in(directory).directory.is_dir():
            self._of_baselines(directory).finish()

    def _prepare_pools(self, directory: Path, on_block: OnBlock = no_report) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        n_blocks = len(self.anatomy.blocks)
        if load_pools(directory / POOLS, self._identity) is None:
            pools = self._new_pools(lambda share: on_block(round(share * n_blocks) - 1))
            save_pools(directory / POOLS, pools, self._identity)

    # --- statistics that are known to be needed before the search ---

    @property
    def independent_blocks(self) -> bool:
        return bool(self.statistics[0])

    @property
    def _gram(self) -> bool:
        """True if the baselines need Gram matrices."""
        return "gram" in self.statistics[0].values()

    def worker_stores(self, directory: Path) -> Sequence[WorkerStore]:
        """The statistics of the dense model on the windows of the baselines, unless the search has begun with some."""
        if not self.independent_blocks or self._cache_in(directory).has_entries:
            return []
        self._prepare_pools(directory)
        return self._of_baselines(directory).stores()

    def prepare_blocks(self, directory: Path, blocks: Collection[int], on_block: OnBlock = no_report) -> None:
        """Statistics of these blocks on the calibration set of this pruner."""
        tokens, gram = self.calibration.tokens, self._gram
        build_block_statistics(
            directory, self.anatomy, tokens, self._model, gram=gram, only=blocks, on_block=on_block
        )

    def _of_baselines(self, directory: Path) -> BaselineStatistics:
        pools = load_pools(directory / POOLS)
        assert pools is not None, "prepared before"
        context = self._context_of(pools, self._cache_in(directory))
        return BaselineStatistics(context, self._baseline_forms, gram=self._gram)

    def _cache_in(self, directory: Path) -> StatisticsCache:
        return StatisticsCache(directory / STATISTICS, round(self.settings.cache_gb * 1e9))

    # --- in a search ---

    def open(self, directory: Path) -> None:
        pools = load_pools(directory / POOLS)
        assert pools is not None, "written before workers start"
        self._use(pools, self._cache_in(directory), directory / PROFILE)
        if self.settings.proxy is not None:
            self._proxy = RecipeProxy(directory, self.anatomy, self._proxy_blocks)

    @property
    def _proxy_blocks(self) -> list[int]:
        return proxy_blocks(self.anatomy, self.settings.proxy)

    def proxy_loss(self, config: Config) -> float:
        """Foretold loss, see `RecipeProxy`, of the weights before any training of the schedule.

        The weights are pruned, and kept for a measurement that follows, unless that trains.
        """
        assert self._proxy is not None, "the settings say whether there is a proxy"
        plan = self.plan(untrained(config))
        return 0.0 if plan is None else self._proxy.loss(plan, self._live)

    def reuse(self, directory: Path) -> None:
        """Use pools that an earlier search wrote."""
        self._earlier = directory

    @property
    def _opened(self) -> Plans:
        """Plans on the opened context, else on a new one, whose statistics are deleted with this object."""
        if self._plans is None:
            scratch = Path(mkdtemp(prefix="secateur-"))
            finalize(self, shutil.rmtree, scratch, ignore_errors=True)
            cache = StatisticsCache(scratch, sys.maxsize)  # for one recipe
            earlier = None if self._earlier is None else load_pools(self._earlier / POOLS, self._identity)
            self._use(earlier or self._new_pools(), cache, Path(self.settings.profile or ""))
        assert self._plans is not None
        return self._plans

    @property
    def context(self) -> RecipeContext:
        """What recipes are planned on."""
        return self._opened.context

    def _use(self, pools: Mapping[str, Pool], cache: StatisticsCache, profile: Path) -> None:
        lines = () if self.settings.profile is None else read_profile(profile)
        self.use(self._context_of(pools, cache, lines))

    def _context_of(
        self, pools: Mapping[str, Pool], cache: StatisticsCache, profile: Profile = ()
    ) -> RecipeContext:
        of, shape = self.settings, self.dense.shape
        protect, prompts = tuple(of.protect), self.dense.prompts
        return RecipeContext(
            self.anatomy, self._model, pools, cache, shape, self.seed, of.dampening, protect, profile, prompts
        )

    def use(self, context: RecipeContext) -> None:
        """Plan recipes on this context."""
        self._plans = Plans(self.settings.unit, context)
        blocks = self.anatomy.blocks
        layouts = [None] * len(blocks) if self.settings.unit == "weights" else context.layouts
        self._live = [LiveBlock(block, layout) for block, layout in zip(blocks, layouts, strict=True)]
        self._now: list[Hashable] = [DENSE] * len(blocks)
        self._stream: LiveStream | None = None
        self._told: set[str] = set()

    def _new_pools(self, on_share: Callable[[float], None] = lambda share: None) -> dict[str, Pool]:
        return build_pools(self.anatomy, self._tokens, look=self._look, on_share=on_share)

    @property
    def _tokens(self) -> dict[str, Int64[Tensor, " tokens"]]:
        return {name: source.tokens for name, source in self.calibration.sources.items()}

    @property
    def _look(self) -> bool:
        """True if windows are chosen by losses or states of the dense model."""
        return any(choice != "random" for choice in self.settings.choose)

    @property
    def _identity(self) -> str:
        hashes = {name: source.sha256 for name, source in self.calibration.sources.items()}
        return pool_identity(
            self._model, hashes, self.settings.pool_tokens, look=self._look, bos=self.anatomy.bos
        )

    @property
    def _model(self) -> str:
        """Identity of the model and its precision."""
        whole = " all experts" if self.anatomy.all_experts else ""
        return f"{self.dense.fingerprint} torch.{self.dense.dtype}{whole}"

    def plan(self, config: Config) -> PruningPlan | None:
        """The plan of a recipe, see `Plans.of`."""
        return self._opened.of(config)

    def keys(self, config: Config) -> Sequence[Hashable]:
        plan = self.plan(config)
        if plan is None:
            return [DENSE] * len(self._live)
        self._opened.hold(plan)
        return plan.keys

    def cost(self, candidate: Any) -> Mapping[str, float]:
        plan = self.plan(self.space.config(candidate))
        return super().cost(candidate) if plan is None else plan.costs

    def merges(self, config: Config) -> bool:
        return bool(config["unit"] == "blocks" and config["repair"] != "none")

    def training_tokens(self, config: Config) -> int:
        name = json.dumps(config, sort_keys=True)
        if name in self._told:
            return 0
        self._told.add(name)
        return computed_tokens(config)

    def apply(self, block: int, key: Hashable) -> None:
        if self._now[block] == key:
            return
        self._live[block].restore()
        if key != DENSE:
            self._opened.at(block, key).change(self._live[block])
        self._narrow(block, key)
        self._now[block] = key

    def finish(self, key: Hashable) -> None:
        self._narrow(len(self._live), key)

    def _narrow(self, block: int, key: Hashable) -> None:
        """Narrow the stream in a block, or behind the last one, as the plan of the key of this block, or that, says."""
        plan = None if key == DENSE else self._opened.at(min(block, len(self._live) - 1), key)
        narrow = None if plan is None else plan.narrow
        if narrow is not None:
            self._stream = self._stream or LiveStream(self.anatomy)
            self._stream.narrow_block(block, narrow)
        elif self._stream is not None:
            self._stream.restore_part(block)

    def release(self, block: int) -> None:
        self.apply(block, DENSE)

    def restore(self) -> None:
        for block in range(len(self._live)):
            self.release(block)
        self.finish(DENSE)
        self._opened.release()

    def fitted(self, form: Config) -> Config:
        """The recipe itself: it names no part of a model but protected projections."""
        return form

    def costs_of(self, config: Config) -> Mapping[str, float]:
        plan = self.plan(config) if self.is_smaller(self.settings) else None
        return super().costs_of(config) if plan is None else plan.costs

    def prune(self, config: Config, *, sequential: bool, on_block: OnBlock = no_report) -> None:
        """Prune the live model by the recipe; the weights are those that a search measures.

        Raises:
            ValueError: if sequential statistics are asked for, or the recipe can't be carried out.
        """
        if sequential:
            raise ValueError(
                "Expected statistics of the dense model for a recipe, got `sequential`. Leave `--calibration` out."
            )
        keys = self.keys(config)
        for block, key in zip(self.anatomy.blocks, keys, strict=True):
            if key != DENSE:
                self.apply(block.index, key)
                self._live[block.index].finish()
            on_block(block.index)
        self.finish(keys[-1])

    def blockwise(self, config: Config, *, sequential: bool) -> BlockwisePruning:
        if self.settings.unit != "weights":
            return super().blockwise(config, sequential=sequential)
        if self._look:
            raise NotStreamedError("Expected calibration windows chosen at random, got others.")
        return weights_by_block(self.context, config)

    @classmethod
    def formats(cls, settings: Any) -> tuple[str, ...]:
        return tuple(FORMATS) if cls.is_smaller(settings) else ("hf",)

    def check_format(self, config: Config, tokenizer: PreTrainedTokenizerBase, form: str) -> None:
        kept = self._kept(config)
        if self.is_smaller(self.settings):
            check_structured(self.anatomy, tokenizer, kept, form, self._narrow_of(config))

    def record(self, config: Config) -> dict[str, Any]:
        of = self.settings
        more = {"protect": list(of.protect), "profile": of.profile}
        return {"recipe": dict(config), "damp": of.dampening} | {k: v for k, v in more.items() if v}

    def asked(self, config: Config) -> dict[str, Any]:
        """Nothing: the sparsity of each projection is known when the recipe is planned."""
        return {"asked": {}}

    def calibration_record(self) -> dict[str, Any]:
        """The texts that windows are chosen from, by the recipe and the seed."""
        sources = self.calibration.sources
        return {
            "sources": {name: source.name for name, source in sources.items()},
            "pool_tokens": self.settings.pool_tokens,
            "sha256": {name: source.sha256 for name, source in sources.items()},
            **self.further_record,
        }

    def save(
        self,
        loaded: LoadedModel,
        config: Config,
        to: Path,
        manifest: Manifest,
        check_tokens: Int64[Tensor, "rows length"],
    ) -> ExportReport:
        """Save zeros in the parent's class unless biases were added; smaller models by `export_structured`."""
        plan, kept = self.plan(config), self._kept(config)
        manifest = replace(manifest, asked={} if plan is None else dict(plan.sparsity))
        if not self.is_smaller(self.settings) and not CutModel(self.anatomy, kept).added_biases():
            return super().save(loaded, config, to, manifest, check_tokens)
        return export_structured(
            self.anatomy,
            loaded.tokenizer,
            kept,
            manifest,
            to,
            check_tokens=check_tokens,
            dtype=loaded.stored_dtype,
            units=() if plan is None else plan.units,
            narrow=self._narrow_of(config),
        )

    def _narrow_of(self, config: Config) -> Narrow | None:
        plan = self.plan(config)
        return None if plan is None else plan.narrow

    def _kept(self, config: Config) -> Sequence[Kept]:
        plan = self.plan(config)
        return [block.whole for block in self.anatomy.blocks] if plan is None else plan.kept
