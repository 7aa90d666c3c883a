"""The spaces by name. A new one is a new file and a row here, or an entry point of the group ``secateur.spaces``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secateur.spaces.allocation.settings import AllocationSettings, build_allocation
from secateur.spaces.architecture.settings import ArchitectureSettings, build_architecture
from secateur.spaces.formulas.settings import FormulaSettings, build_formula
from secateur.spaces.masks.settings import MaskSettings, build_masks
from secateur.spaces.plugins import Registry, Row
from secateur.spaces.recipe.build import build_recipe
from secateur.spaces.recipe.settings import RecipeSettings
from secateur.spaces.space import Space
from secateur.spaces.space_settings import SpaceSettings


@dataclass(frozen=True)
class SpaceRow(Row):
    """One space.

    Args:
        settings: model of the section ``space`` of the settings.
        build: makes the space from (settings, linears as `Prunable`, `ModelShape`).
        pruner: path of the class that prunes by its candidates, ``module:name``.
        summary: one line for ``secateur list spaces``.
        source: address of the paper that it comes from.
    """

    settings: type[SpaceSettings]
    build: Callable[..., Space[Any]]
    pruner: str
    summary: str
    source: str


SPACES: Registry[SpaceRow] = Registry(
    "secateur.spaces",
    SpaceRow,
    {
        "allocation": SpaceRow(
            settings=AllocationSettings,
            build=build_allocation,
            pruner="secateur.pruners.weights.pruner:AllocationPruner",
            summary="a level of sparsity for each linear, sub-layer or block, at a global sparsity",
            source="https://arxiv.org/abs/2410.14649",
        ),
        "architecture": SpaceRow(
            settings=ArchitectureSettings,
            build=build_architecture,
            pruner="secateur.pruners.structure.pruner:ArchitecturePruner",
            summary="KV groups and FFN channels of each block, at a share of parameters, MACs, bytes or time",
            source="https://arxiv.org/abs/2502.07780",
        ),
        "formula": SpaceRow(
            settings=FormulaSettings,
            build=build_formula,
            pruner="secateur.pruners.weights.formula_pruner:FormulaPruner",
            summary="an importance metric as an expression, at one sparsity of all linears",
            source="https://arxiv.org/abs/2406.02924",
        ),
        "masks": SpaceRow(
            settings=MaskSettings,
            build=build_masks,
            pruner="secateur.pruners.structure.masks:MaskPruner",
            summary="which KV groups and FFN channels each block keeps, inherited and varied as masks",
            source="https://arxiv.org/abs/2409.17372",
        ),
        "recipe": SpaceRow(
            settings=RecipeSettings,
            build=build_recipe,
            pruner="secateur.pruners.recipes.pruner:RecipePruner",
            summary="calibration data, metric, allocation and repair together, of weights, structure or blocks",
            source="https://arxiv.org/abs/2503.06184",
        ),
    },
)
