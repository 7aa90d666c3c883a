"""How architectures turn into smaller models: the store of what can be cut, and the cut for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.pruners.depth.depth import depth_scores
from secateur.pruners.export.capability import check_carrier
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.stores.block_files import is_built
from secateur.pruners.structure.remove import prune_structure
from secateur.pruners.structure.reorder import Recipe
from secateur.pruners.structure.store import StructureKey, StructureStore, build_structure
from secateur.pruners.structure.switching import StructureSwitcher
from secateur.spaces.architecture.candidate import KeptUnits, read_kept
from secateur.spaces.methods import DEPTH

if TYPE_CHECKING:
    from secateur.evaluators.plan import Plan
    from secateur.evaluators.session import Workbench


def build_cuts(bench: Workbench, directory: Path, on_block: Callable[[int], None]) -> None:
    """Build the structure store, unless it is there."""
    of, levels = bench.plan.space, bench.space.levels
    repaired = of.repairs != ("none",)  # without a repair every number is a level
    key = StructureKey(
        model=bench.loaded.fingerprint,
        dtype=str(next(bench.anatomy.linears).weight.dtype).removeprefix("torch."),
        calibration=bench.calibration_sha256,
        importance=of.importance,
        repairs=of.repairs,
        kv_groups=_union(block.kv_groups for block in levels) if repaired else (),
        ffn=_union(block.ffn for block in levels) if repaired else (),
        damp=of.damp,
    )
    if not is_built(directory, key):
        build_structure(directory, bench.anatomy, bench.calibration, key, on_block=on_block)


def _union(levels: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted({number for block in levels for number in block}))


def scored_baselines(bench: Workbench, directory: Path) -> dict[str, Any]:
    """Architectures that known allocations give, from scores that are kept in the store or beside it."""
    kinds = bench.plan.space.scored
    if not kinds:
        return {}
    scores = StructureStore(directory, bench.anatomy).scores
    blocks = depth_scores(
        [kind for kind in kinds if kind in DEPTH],
        bench.anatomy,
        bench.calibration,
        directory,
        f"{bench.loaded.fingerprint} {bench.calibration_sha256}",
        scores.influence,
    )
    found: dict[str, Any] = bench.space.scored_baselines(kinds, replace(scores, blocks=blocks))
    return found


def structure_switcher(plan: Plan, space: Any, anatomy: Anatomy, directory: Path) -> StructureSwitcher:
    """Over what `build_cuts` made."""
    return StructureSwitcher(anatomy, StructureStore(directory, anatomy))


def structure_record(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """How units go."""
    of = plan.space
    return {"importance": of.importance, "repair": config["repair"], "damp": of.damp}


def remove_structure(
    bench: Workbench, config: Mapping[str, Any], sequential: bool, on_block: Callable[[int], None]
) -> tuple[KeptUnits, ...]:
    """Cut the live model for good; the units that stay, block by block."""
    return prune_structure(
        bench.anatomy,
        read_kept(config),
        **structure_record(bench.plan, config),
        tokens=bench.calibration,
        sequential=sequential,
        on_block=on_block,
    )


def check_recipe(plan: Plan) -> None:
    """Refuse an unknown importance."""
    Recipe(plan.space.importance, plan.space.repairs, plan.space.damp)


def check_form(plan: Plan, anatomy: Anatomy) -> None:
    """See that an export can carry what will be found."""
    check_carrier(plan.space, anatomy)
