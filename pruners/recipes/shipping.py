"""How models of recipes leave for the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.export import ExportReport
from secateur.pruners.export.manifest import Manifest
from secateur.pruners.export.registry import FORMATS
from secateur.pruners.export.save_session import save_cut, save_zeros
from secateur.pruners.export.structured import check_structured
from secateur.spaces.architecture.candidate import Kept

if TYPE_CHECKING:
    from secateur.evaluators.session import Workbench

Config = Mapping[str, Any]


def recipe_formats(space: Any) -> tuple[str, ...]:
    """Zeros in place go into the parent's own form, smaller models into any."""
    return ("hf",) if space.unit == "weights" else tuple(FORMATS)


def recipe_calibration(bench: Workbench) -> dict[str, Any]:
    """What recipes choose their windows from; the recipe says which, and the seed."""
    return {
        "sources": {name: text.source for name, text in bench.sources.items()},
        "pool_tokens": bench.plan.space.pool_tokens,
        "sha256": {name: text.sha256 for name, text in bench.sources.items()},
    }


def check_recipe(bench: Workbench, config: Config, form: str) -> None:
    """See that the format can carry what the recipe comes to; the live model is dense, and stays so.

    Raises:
        ValueError: if it can't, or the recipe can't be carried out.
    """
    kept = _kept(bench, config)
    if bench.plan.space.unit != "weights":
        check_structured(bench.anatomy, bench.loaded.tokenizer, kept, form)


def save_recipe(bench: Workbench, config: Config, to: Path, manifest: Manifest) -> ExportReport:
    """Save the live model, which the recipe was carried out on."""
    decision, kept = bench.recipes.decide(config), _kept(bench, config)
    asked = {} if decision is None else dict(decision.sparsity)
    manifest = replace(manifest, asked=asked)
    if bench.plan.space.unit == "weights" and not CutModel(bench.anatomy, kept).added_biases():
        return save_zeros(bench, to, manifest)
    return save_cut(bench, kept, to, manifest, () if decision is None else decision.units)


def _kept(bench: Workbench, config: Config) -> Sequence[Kept]:
    decision = bench.recipes.decide(config)
    if decision is None:
        return [Kept(block.n_kv_heads, block.ffn_width) for block in bench.anatomy.blocks]
    return decision.kept
