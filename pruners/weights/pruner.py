"""Unstructured pruning at a sparsity for each projection: levels of a store in a search, one pass for good."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.blockwise import BlockwisePruning
from secateur.pruners.calibration.collected import unpacked_inputs
from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.gradients import model_statistics
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.masks import check_sparsity
from secateur.pruners.models.anatomy import Anatomy, Block, Linear
from secateur.pruners.models.mapped import NotStreamedError
from secateur.pruners.models.shape import prunables
from secateur.pruners.pruner import Config, OnBlock, Pruner, no_report
from secateur.pruners.stores.block_files import is_built
from secateur.pruners.weights.level_store import LevelStore, StoreKey, build_levels, level_bytes
from secateur.pruners.weights.method import Method
from secateur.spaces.allocation.settings import build_allocation
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.levels import sparsities_of
from secateur.spaces.shape import by_depth, role_of


class WeightPruner(Pruner):
    """Pruner of single weights by a method, at a sparsity for each projection."""

    @classmethod
    def check_model(cls, settings: Any, anatomy: Anatomy) -> None:
        size = settings.group_size
        for linear in anatomy.linears:
            if size is not None and linear.in_features % size:
                raise ValueError(
                    f"Expected `space.group_size` to divide the number of inputs, got {size} for "
                    f"{linear.in_features} inputs at {linear.name}. Choose another, or protect this layer."
                )

    @abstractmethod
    def method(self, config: Config) -> Method:
        """Metric or reconstruction of a candidate, with its parameters."""

    @property
    def expected(self) -> Mapping[str, float] | None:
        """Sparsity of each projection in the model whose activations the searched weights come from; None: dense."""
        return None

    def prune(self, config: Config, *, sequential: bool, on_block: OnBlock = no_report) -> None:
        prune(
            self.anatomy,
            config["sparsity"],
            self.method(config),
            self.calibration.tokens,
            sequential=sequential,
            expected=None if sequential else self.expected,
            contrast=self.calibration.contrast,
            on_block=on_block,
        )

    def blockwise(self, config: Config, *, sequential: bool) -> BlockwisePruning:
        if not sequential and self.expected is not None:
            raise NotStreamedError(
                "Expected statistics of the dense model or of already pruned blocks, got those of an expected sparsity."
            )
        method, sparsity = self.method(config), config["sparsity"]
        if method.gradients:
            raise NotStreamedError(f"Expected a metric without gradients, got {method.name}.")
        check_sparsity(self.anatomy, sparsity)
        whole = ModelStatistics(len(self.anatomy.blocks), {})

        @torch.no_grad()
        def prune(block: Block, statistics: dict[str, Tensor]) -> None:
            gram = method.needs == "gram"
            inputs = unpacked_inputs(block, statistics, gram=gram) if statistics else {}
            for linear in block.linears:
                if wanted := sparsity.get(linear.name, 0.0):
                    linear.point_to(method.weights(linear, inputs.get(linear.name), [wanted], whole)[0])

        return BlockwisePruning(self.calibration.tokens, method.needs, sparsity, prune, sequential)

    def record(self, config: Config) -> dict[str, Any]:
        return self.method(config).record

    def asked(self, config: Config) -> dict[str, Any]:
        return {"asked": config["sparsity"]}


class AllocationPruner(WeightPruner):
    """Pruner of the space ``allocation``: each projection at a level of sparsity."""

    @classmethod
    def check_settings(cls, settings: Any) -> None:
        method_of(settings, seed=0)

    @classmethod
    def check_model(cls, settings: Any, anatomy: Anatomy) -> None:
        super().check_model(settings, anatomy)
        known = {linear.name for linear in anatomy.linears}
        if settings.found is not None and settings.found.keys() != known:
            raise ValueError(
                f"Expected `space.found` to name the {len(known)} projections of this model, got "
                f"{len(settings.found)}, of another model. Remove it, and set `space.statistics` to sequential."
            )

    @classmethod
    def by_blocks(cls, settings: Any) -> bool:
        return not method_of(settings, seed=0).gradients

    def method(self, config: Config) -> Method:
        return method_of(self.settings, seed=self.seed)

    @property
    def expected(self) -> Mapping[str, float] | None:
        found: Mapping[str, float] | None = self.settings.found
        share = self.settings.expected_share
        if found is not None or share is None:
            return found
        space = self.space or build_allocation(self.settings, prunables(self.anatomy), self.dense.shape)
        uniform: Mapping[str, float] = space.config(space.baselines()[f"uniform@{share:.10g}"])["sparsity"]
        return uniform

    @property
    def searched_statistics(self) -> str:
        share = self.settings.expected_share
        if self.settings.found is not None:
            return "expected at the allocation that the stage before found"
        return super().searched_statistics if share is None else f"expected at {share:.10g}"

    keys_of_configs: ClassVar[bool] = True
    on_device: ClassVar[bool] = True

    def stored_bytes(self) -> int:
        return level_bytes(self.anatomy, self.space.levels, method_of(self.settings, seed=self.seed))

    @property
    def streamed(self) -> Mapping[str, Any]:
        return {"inputs": method_of(self.settings, seed=self.seed).needs, "sequential": bool(self.expected)}

    @property
    def gradients(self) -> Sequence[Kind]:
        return method_of(self.settings, seed=self.seed).gradients

    def prepare(self, directory: Path, on_block: OnBlock = no_report) -> None:
        self._build(directory, None, on_block)

    @property
    def independent_blocks(self) -> bool:
        return self.expected is None and not self.gradients

    def prepare_blocks(self, directory: Path, blocks: Collection[int], on_block: OnBlock = no_report) -> None:
        self._build(directory, blocks, on_block)

    def _build(self, directory: Path, only: Collection[int] | None, on_block: OnBlock) -> None:
        key = StoreKey(
            model=self.dense.fingerprint,
            dtype=self.dense.dtype,
            calibration=self.calibration.sha256,
            method=method_of(self.settings, seed=self.seed),
            levels=self.space.levels,
            expected=self.expected,
        )
        if not is_built(directory, key):
            of = self.calibration
            build_levels(
                directory,
                self.anatomy,
                of.tokens,
                key,
                contrast=of.contrast,
                on_block=on_block,
                only=only,
            )

    def open(self, directory: Path) -> None:
        self._store = LevelStore(directory, self.anatomy, self.space.levels)
        self._dense = tuple((0,) * len(block.linears) for block in self.anatomy.blocks)
        self._now = list(self._dense)

    @cached_property
    def _index(self) -> dict[str, dict[float, int]]:
        """Levels of each projection by their sparsities."""
        levels = self.space.levels
        return {
            x.name: {s: level for level, s in enumerate(sparsities_of(levels, x.n_weights, x.name))}
            for x in self.anatomy.linears
        }

    def keys(self, config: Config) -> Sequence[Hashable]:
        """Tuples of levels, one level a projection."""
        sparsity = config["sparsity"]
        return [
            tuple(self._index[linear.name][sparsity[linear.name]] for linear in block.linears)
            for block in self.anatomy.blocks
        ]

    def apply(self, block: int, key: Hashable) -> None:
        """Point the projections whose level changes to the weights of their new level."""
        assert isinstance(key, tuple)
        before = self._now[block]
        for linear, old, new in zip(self.anatomy.blocks[block].linears, before, key, strict=True):
            if old != new:
                linear.point_to(self._store.weight(linear, new))
        self._now[block] = key

    def weights_of(self, block: int, key: Hashable) -> Mapping[str, Tensor]:
        assert isinstance(key, tuple)
        linears = self.anatomy.blocks[block].linears
        return {x.name: self._store.weight(x, level) for x, level in zip(linears, key, strict=True)}

    def release(self, block: int) -> None:
        for linear, level in zip(self.anatomy.blocks[block].linears, self._now[block], strict=True):
            if level:
                self._store.take_back(linear, level)
        self._now[block] = self._dense[block]

    def restore(self) -> None:
        for block, key in enumerate(self._dense):
            self.apply(block, key)

    def fitted(self, form: Mapping[str, Any]) -> Config:
        """Sparsities of the block at the same relative depth, by role; of an unknown role the sub-layer's mean."""
        rows = by_depth(form["blocks"], len(self.anatomy.blocks))
        return {
            "sparsity": {
                linear.name: self._at_role(linear, row)
                for block, row in zip(self.anatomy.blocks, rows, strict=True)
                for linear in block.linears
            }
        }

    def _at_role(self, linear: Linear, row: Mapping[str, Mapping[str, float]]) -> float:
        roles = row.get(linear.sublayer)
        if not roles:
            raise ValueError(
                f"Expected sparsities of {linear.sublayer}, got {', '.join(row) or 'none'} at {linear.name}. The "
                "candidate is of a model of another kind."
            )
        mean = sum(roles.values()) / len(roles)
        sparsity = roles.get(role_of(linear.name), mean)
        size = self.settings.group_size
        return sparsity if size is None else round(sparsity * size) / size


def method_of(settings: Any, *, seed: int) -> Method:
    """Method of the settings of the space ``allocation``.

    Raises:
        ValueError: if there is no such method, or it can't prune in groups.
    """
    return Method(
        name=settings.metric,
        comparison=settings.comparison,
        group_size=settings.group_size,
        dampening=settings.dampening,
        block_size=settings.block_size,
        seed=seed,
        formula=formula_of(settings.metric),
    )


@torch.no_grad()
def prune(
    anatomy: Anatomy,
    sparsity: Mapping[str, float],
    method: Method,
    tokens: Int[Tensor, "windows length"],
    *,
    sequential: bool,
    expected: Mapping[str, float] | None = None,
    contrast: Int[Tensor, "others _"] | None = None,
    on_block: OnBlock = no_report,
) -> None:
    """Zero weights of the live model, block by block.

    Args:
        anatomy: the model; its weights are replaced by new tensors, never written in place.
        sparsity: by the projection's full name; a projection without an entry is not pruned.
        method: metric or reconstruction.
        tokens: calibration windows.
        sequential: statistics of a block come from already pruned blocks (as in the released Wanda and
            SparseGPT); otherwise from the dense model (as a level store must). Gradients are the dense model's
            either way: one pass before the first block is pruned.
        expected: sparsities by name; statistics of a block come from blocks that are pruned to these by the same
            method, as those of a level store do with expected levels. Only without `sequential`.
        contrast: windows of the second calibration set, for methods that need one.
        on_block: told the index of each block that is done.

    Raises:
        ValueError: on a name that the model does not have, or a sparsity outside [0, 1].
    """
    check_sparsity(anatomy, sparsity)
    whole = model_statistics(anatomy, tokens, gradients=method.gradients, contrast=contrast)
    behind = sparsity if expected is None else expected
    later: list[tuple[Linear, Tensor]] = []
    for part in stream_blocks(
        anatomy, tokens, inputs=method.needs, sequential=sequential or expected is not None
    ):
        _point(later)  # the block before, which has given its outputs
        for linear in part.block.linears:
            wanted, now = sparsity.get(linear.name, 0.0), behind.get(linear.name, 0.0)
            pruned = sorted({wanted, now} - {0.0})
            if pruned:
                found = method.weights(linear, part.inputs.get(linear.name), pruned, whole)
                weights = {0.0: linear.weight, **dict(zip(pruned, found, strict=True))}
                linear.point_to(weights[now])
                later.append((linear, weights[wanted]))
        on_block(part.block.index)
    _point(later)


def _point(weights: list[tuple[Linear, Tensor]]) -> None:
    """Point projections to these weights, and empty the list."""
    for linear, weight in weights:
        linear.point_to(weight)
    weights.clear()
