"""How the candidates of each space turn into weights: what is made beforehand, and who switches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.evaluators.formula_switching import FormulaSwitcher
from secateur.evaluators.switching import LevelSwitcher, Switcher
from secateur.pruners.families.anatomy import Anatomy
from secateur.pruners.formulas import store as terminals
from secateur.pruners.levels import LevelStore, StoreKey, build_levels, is_built
from secateur.pruners.methods import Method
from secateur.spaces.formulas.metric import program_of

if TYPE_CHECKING:
    from secateur.evaluators.workbench import Plan, Workbench

OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class Rig:
    """What one kind of space needs besides the dense model.

    Args:
        build: makes what switchers read in a directory, unless it is there: (bench, directory, on block).
        switcher: over such a directory: (plan, space, anatomy, directory).
        method: how the weights of a configuration go, for an export: (plan, configuration).
    """

    build: Callable[[Workbench, Path, OnBlock], None]
    switcher: Callable[[Plan, Any, Anatomy, Path], Switcher]
    method: Callable[[Plan, Mapping[str, Any]], Method]


def _build_levels(bench: Workbench, directory: Path, on_block: OnBlock) -> None:
    key = StoreKey(
        model=bench.loaded.fingerprint,
        dtype=str(next(bench.anatomy.linears).weight.dtype).removeprefix("torch."),
        calibration=bench.calibration_sha256,
        method=_level_method(bench.plan, {}),
        levels=bench.space.levels,
    )
    if not is_built(directory, key):
        build_levels(directory, bench.anatomy, bench.calibration, key, on_block=on_block)


def _level_switcher(plan: Plan, space: Any, anatomy: Anatomy, directory: Path) -> Switcher:
    return LevelSwitcher(anatomy, LevelStore(directory, anatomy, space.levels), space.levels)


def _level_method(plan: Plan, config: Mapping[str, Any]) -> Method:
    of = plan.space
    return Method(
        name=of.metric,
        comparison=of.comparison,
        group_size=of.group_size,
        damp=of.damp,
        block_size=of.block_size,
        seed=plan.seed,
        program=program_of(of.metric),
    )


def _build_terminals(bench: Workbench, directory: Path, on_block: OnBlock) -> None:
    names, identity = bench.space.terminals, _identity(bench.plan, bench.loaded.fingerprint, bench)
    (directory.parent / directory.name).mkdir(parents=True, exist_ok=True)
    (directory / "identity").write_text(identity, encoding="ascii")
    if not terminals.is_built(directory, names, identity):
        terminals.build_terminals(
            directory,
            bench.anatomy,
            bench.calibration,
            names,
            identity,
            damp=bench.plan.space.damp,
            on_block=on_block,
        )


def _identity(plan: Plan, fingerprint: str, bench: Workbench) -> str:
    return terminals.identity_of(fingerprint, bench.calibration_sha256, str(plan.space.damp))


def _formula_switcher(plan: Plan, space: Any, anatomy: Anatomy, directory: Path) -> Switcher:
    identity = (directory / "identity").read_text(encoding="ascii")
    store = terminals.TerminalStore(directory, anatomy, space.terminals, identity)
    of = plan.space
    return FormulaSwitcher(anatomy, store, program_of, comparison=of.comparison, group_size=of.group_size)


def _formula_method(plan: Plan, config: Mapping[str, Any]) -> Method:
    of, metric = plan.space, config["metric"]
    return Method(
        name=metric or "magnitude",
        comparison=of.comparison,
        group_size=of.group_size,
        damp=of.damp,
        program=program_of(metric) if metric else None,
    )


# By the kind of the space.
RIGS: dict[str, Rig] = {
    "allocation": Rig(_build_levels, _level_switcher, _level_method),
    "formula": Rig(_build_terminals, _formula_switcher, _formula_method),
}
