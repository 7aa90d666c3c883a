"""How the candidates of each space turn into weights: what is made beforehand, and who switches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.evaluators.proxy import Proxy
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.checks import check_model, check_names
from secateur.pruners.recipes.pruner import (
    build_basis,
    check_windows,
    prune_recipe,
    recipe_cost,
    recipe_record,
    recipe_switcher,
)
from secateur.pruners.stores.block_files import is_built
from secateur.pruners.structure.pruner import (
    build_cuts,
    check_form,
    check_recipe,
    remove_structure,
    scored_baselines,
    structure_record,
    structure_switcher,
)
from secateur.pruners.switching import LevelSwitcher, Switcher
from secateur.pruners.weights import formula_store as terminals
from secateur.pruners.weights.formula_overlap import overlaps
from secateur.pruners.weights.formula_proxy import formula_layers, formula_proxy, grams_of
from secateur.pruners.weights.formula_pruner import FormulaSwitcher
from secateur.pruners.weights.level_store import LevelStore, StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.prune import prune
from secateur.spaces.architecture.candidate import KeptUnits
from secateur.spaces.formulas.metric import formula_of

if TYPE_CHECKING:
    from secateur.evaluators.plan import Plan
    from secateur.evaluators.session import Workbench

OnBlock = Callable[[int], None]
MethodOf = Callable[["Plan", Mapping[str, Any]], Method]


@dataclass(frozen=True)
class Rig:
    """What one kind of space needs besides the dense model.

    Args:
        build: makes what switchers read in a directory, unless it is there: (bench, directory, on block).
        switcher: over such a directory: (plan, space, anatomy, directory).
        check: refuses settings that fit no model, before one is loaded.
        check_model: refuses settings that don't fit this one.
        check_texts: refuses texts that are too short, before anything is written.
        record: how the weights of a configuration go, as plain values for the record: (plan, configuration).
        prune: makes the live model what a configuration says, for real: (bench, configuration, sequential, on block);
            gives the units that stay, where it cuts.
        describe: what is worth knowing of finished candidates beside their values, as plain values: (bench, directory,
            candidates).
        proxy: measures without a forward pass, over what `build` made: (plan, space, anatomy, directory).
        further: baselines that need what `build` made, by name: (bench, directory).
        cost: exact counts of a configuration where the space's own are not, or None: (bench, configuration).
        cuts: whether candidates are really smaller: the space must know then what the parts of each block weigh.
    """

    build: Callable[[Workbench, Path, OnBlock], None]
    switcher: Callable[[Plan, Any, Anatomy, Path], Switcher]
    check: Callable[[Plan], None]
    check_model: Callable[[Plan, Anatomy], None]
    record: Callable[[Plan, Mapping[str, Any]], dict[str, Any]]
    prune: Callable[[Workbench, Mapping[str, Any], bool, OnBlock], tuple[KeptUnits, ...]]
    describe: Callable[[Workbench, Path, Sequence[str]], dict[str, Any]] | None = None
    proxy: Callable[[Plan, Any, Anatomy, Path], Proxy] | None = None
    further: Callable[[Workbench, Path], Mapping[str, Any]] | None = None
    cost: Callable[[Workbench, Mapping[str, Any]], Mapping[str, float] | None] | None = None
    check_texts: Callable[[Workbench], None] = lambda bench: None
    cuts: Callable[[Plan], bool] = lambda plan: False


def _build_levels(bench: Workbench, directory: Path, on_block: OnBlock) -> None:
    key = StoreKey(
        model=bench.loaded.fingerprint,
        dtype=str(next(bench.anatomy.linears).weight.dtype).removeprefix("torch."),
        calibration=bench.calibration_sha256,
        method=level_method(bench.plan, {}),
        levels=bench.space.levels,
    )
    if not is_built(directory, key):
        build_levels(directory, bench.anatomy, bench.calibration, key, on_block=on_block)


def _level_switcher(plan: Plan, space: Any, anatomy: Anatomy, directory: Path) -> Switcher:
    return LevelSwitcher(anatomy, LevelStore(directory, anatomy, space.levels), space.levels)


def level_method(plan: Plan, config: Mapping[str, Any]) -> Method:
    """How weights of the space ``allocation`` go."""
    of = plan.space
    return Method(
        name=of.metric,
        comparison=of.comparison,
        group_size=of.group_size,
        damp=of.damp,
        block_size=of.block_size,
        seed=plan.seed,
        formula=formula_of(of.metric),
    )


def _build_terminals(bench: Workbench, directory: Path, on_block: OnBlock) -> None:
    names, damp = bench.space.terminals, bench.plan.space.damp
    identity = terminals.identity_of(bench.loaded.fingerprint, bench.calibration_sha256, str(damp))
    grams = grams_of(bench.plan.space, len(bench.anatomy.blocks))
    if not terminals.is_built(directory, names, identity, grams):
        terminals.build_terminals(
            directory,
            bench.anatomy,
            bench.calibration,
            names,
            identity,
            damp=damp,
            grams=grams,
            on_block=on_block,
        )


def _formula_switcher(plan: Plan, space: Any, anatomy: Anatomy, directory: Path) -> Switcher:
    return FormulaSwitcher(anatomy, formula_layers(plan, space, anatomy, directory), formula_of)


def _formula_method(plan: Plan, config: Mapping[str, Any]) -> Method:
    of, metric = plan.space, config["metric"]
    return Method(
        name=metric or "magnitude",
        comparison=of.comparison,
        group_size=of.group_size,
        damp=of.damp,
        formula=formula_of(metric) if metric else None,
    )


def _record_of(method: MethodOf) -> Callable[[Plan, Mapping[str, Any]], dict[str, Any]]:
    return lambda plan, config: method(plan, config).record


def _zeros_by(
    method: MethodOf,
) -> Callable[[Workbench, Mapping[str, Any], bool, OnBlock], tuple[KeptUnits, ...]]:
    """Pruning that leaves zeros."""

    def run(
        bench: Workbench, config: Mapping[str, Any], sequential: bool, on_block: OnBlock
    ) -> tuple[KeptUnits, ...]:
        how, calibration = method(bench.plan, config), bench.calibration
        prune(bench.anatomy, config["sparsity"], how, calibration, sequential=sequential, on_block=on_block)
        return ()

    return run


def _check_metric(plan: Plan) -> None:
    level_method(plan, {})


def _nothing_to_check(plan: Plan) -> None:
    """The settings of the space were checked when they were read."""


def _check_groups(plan: Plan, anatomy: Anatomy) -> None:
    size = plan.space.group_size
    for linear in anatomy.linears:
        if size is not None and linear.in_features % size:
            raise ValueError(
                f"Expected `space.group_size` to divide the number of inputs, got {size} for "
                f"{linear.in_features} inputs at {linear.name}. Choose another, or protect this layer."
            )


# By the kind of the space.
RIGS: dict[str, Rig] = {
    "allocation": Rig(
        build=_build_levels,
        switcher=_level_switcher,
        check=_check_metric,
        check_model=_check_groups,
        record=_record_of(level_method),
        prune=_zeros_by(level_method),
    ),
    "formula": Rig(
        build=_build_terminals,
        switcher=_formula_switcher,
        check=_nothing_to_check,
        check_model=_check_groups,
        record=_record_of(_formula_method),
        prune=_zeros_by(_formula_method),
        describe=overlaps,
        proxy=formula_proxy,
    ),
    "architecture": Rig(
        build=build_cuts,
        switcher=structure_switcher,
        check=check_recipe,
        check_model=check_form,
        record=structure_record,
        prune=remove_structure,
        further=scored_baselines,
        cuts=lambda plan: True,
    ),
    "recipe": Rig(
        build=build_basis,
        switcher=recipe_switcher,
        check=check_names,
        check_model=check_model,
        record=recipe_record,
        prune=prune_recipe,
        cost=recipe_cost,
        check_texts=check_windows,
        cuts=lambda plan: plan.space.unit != "weights",
    ),
}
