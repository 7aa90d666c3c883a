"""Recipes in a search: what workers read, who switches, and the pruning for good."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.choose import choose
from secateur.pruners.calibration.pool import (
    Pool,
    build_pools,
    first_tokens,
    load_pools,
    pool_identity,
    save_pools,
)
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.allocation.profile import read_profile
from secateur.pruners.recipes.context import Basis
from secateur.pruners.recipes.plan import DENSE, Decision
from secateur.pruners.recipes.switcher import RecipeSwitcher
from secateur.spaces.architecture.candidate import KeptUnits
from secateur.spaces.shape import ModelShape

if TYPE_CHECKING:
    from secateur.evaluators.plan import Plan
    from secateur.evaluators.session import Workbench

POOLS, PROFILE, DENSE_MODEL = "pools.safetensors", "profile.yaml", "dense.json"
"""What workers read."""

STATISTICS = ".statistics"
"""The cache of statistics beside it. Hidden, since each node fills its own: it is no part of what is staged."""


def check_windows(bench: Workbench) -> None:
    """Refuse texts that are too short for the recipes that are measured first, as far as their lengths tell.

    Raises:
        ValueError: if one is.
    """
    pools = build_pools(bench.anatomy, _tokens(bench), look=False)
    for recipe in bench.space.baselines().values():
        calibration = bench.space.config(recipe)["calibration"]
        if calibration["choose"] == "random":
            choose(pools, calibration, bench.plan.seed)


def build_basis(bench: Workbench, directory: Path, on_block: Callable[[int], None]) -> None:
    """Write the pools, unless they are there, and what else workers need to know."""
    directory.mkdir(parents=True, exist_ok=True)
    n_blocks = len(bench.anatomy.blocks)
    _pools(bench, directory, lambda share: on_block(round(share * n_blocks) - 1), keep=True)
    facts = {"model": _model(bench), "shape": bench.space_shape.to_json()}
    (directory / DENSE_MODEL).write_text(json.dumps(facts), encoding="utf-8")
    if bench.plan.space.profile is not None:
        shutil.copyfile(bench.plan.space.profile, directory / PROFILE)


def _pools(
    bench: Workbench,
    directory: Path | None,
    on_share: Callable[[float], None] = lambda share: None,
    *,
    keep: bool = False,
) -> Mapping[str, Pool]:
    """Those in a directory, where they are what they should be, else made anew, and kept there or not."""
    of = bench.plan.space
    look = any(choice != "random" for choice in of.choose)
    hashes = {name: text.sha256 for name, text in bench.sources.items()}
    identity = pool_identity(_model(bench), hashes, of.pool_tokens, look=look)
    pools = None if directory is None else load_pools(directory / POOLS, identity)
    if pools is None:
        pools = build_pools(bench.anatomy, _tokens(bench), look=look, on_share=on_share)
        if directory is not None and keep:
            save_pools(directory / POOLS, pools, identity)
    return pools


def _tokens(bench: Workbench) -> dict[str, Int64[Tensor, " tokens"]]:
    """Of each source."""
    tokenizer, n_tokens = bench.loaded.tokenizer, bench.plan.space.pool_tokens
    return {name: first_tokens(tokenizer, text.text, n_tokens) for name, text in bench.sources.items()}


def _model(bench: Workbench) -> str:
    """What tells the model and its precision from others."""
    return f"{bench.loaded.fingerprint} {next(bench.anatomy.linears).weight.dtype}"


def recipe_switcher(plan: Plan, space: Any, anatomy: Anatomy, directory: Path) -> RecipeSwitcher:
    """Over what `build_basis` wrote."""
    pools = load_pools(directory / POOLS)
    assert pools is not None, "written before workers start"
    facts = json.loads((directory / DENSE_MODEL).read_text(encoding="utf-8"))
    cache = StatisticsCache(directory / STATISTICS, round(plan.space.cache_gb * 1e9))
    shape = ModelShape.from_json(facts["shape"])
    return _switcher(plan, shape, anatomy, pools, facts["model"], cache, directory / PROFILE)


def _switcher(
    plan: Plan,
    shape: ModelShape,
    anatomy: Anatomy,
    pools: Mapping[str, Pool],
    model: str,
    cache: StatisticsCache,
    profile: Path,
) -> RecipeSwitcher:
    of = plan.space
    basis = Basis(
        anatomy,
        model,
        pools,
        cache,
        shape,
        plan.seed,
        of.damp,
        tuple(of.protect),
        () if of.profile is None else read_profile(profile),
    )
    return RecipeSwitcher(basis, of.unit)


class RecipePruner:
    """Decides recipes on a bench's dense model, and carries one out for good; statistics are let go with this object.

    Args:
        bench: with the dense model.
    """

    def __init__(self, bench: Workbench) -> None:
        directory = Path(mkdtemp(prefix="secateur-"))
        finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._anatomy = bench.anatomy
        self._switcher = _switcher(
            bench.plan,
            bench.space_shape,
            bench.anatomy,
            _pools(bench, bench.levels),
            _model(bench),
            StatisticsCache(directory, sys.maxsize),  # for one recipe
            Path(bench.plan.space.profile or ""),
        )

    def decide(self, config: Mapping[str, Any]) -> Decision | None:
        """See `RecipeSwitcher.decide`."""
        return self._switcher.decide(config)

    def prune(self, config: Mapping[str, Any], on_block: Callable[[int], None]) -> tuple[KeptUnits, ...]:
        """Make the live model what the recipe says, with contiguous tensors of its own where it changes.

        The weights are the very ones that a search measures.

        Returns:
            The units that stay, block by block, if some are cut off.
        """
        keys = self._switcher.keys(config)
        for block, key in zip(self._anatomy.blocks, keys, strict=True):
            if key != DENSE:
                self._switcher.apply(block.index, key)
                for parameter in block.module.parameters():
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            on_block(block.index)
        decision = self.decide(config)
        return () if decision is None else tuple(decision.units)


def prune_recipe(
    bench: Workbench, config: Mapping[str, Any], sequential: bool, on_block: Callable[[int], None]
) -> tuple[KeptUnits, ...]:
    """Carry a recipe out on the bench's live model for good; statistics are the dense model's, always.

    Raises:
        ValueError: if sequential statistics are asked for, or the recipe can't be carried out.
    """
    if sequential:
        raise ValueError(
            "Expected statistics of the dense model for a recipe, got `sequential`. Leave `--calibration` out."
        )
    return bench.recipes.prune(config, on_block)


def recipe_record(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """How weights go: the plain form, and what else it depends on."""
    of = plan.space
    more = {"protect": list(of.protect), "profile": of.profile}
    return {"recipe": dict(config), "damp": of.damp} | {name: value for name, value in more.items() if value}


def recipe_cost(bench: Workbench, config: Mapping[str, Any]) -> Mapping[str, float] | None:
    """Exact counts; None for the dense model."""
    decision = bench.recipes.decide(config)
    return None if decision is None else decision.costs
