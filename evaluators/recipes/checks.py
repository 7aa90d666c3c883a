"""What recipes of a plan can't be carried out: seen before minutes of work."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.evaluators.recipes.depth import SHORTGPT
from secateur.evaluators.recipes.unit_metrics import importance_of
from secateur.evaluators.recipes.weight_metrics import blend_of, method_of
from secateur.pruners.block_reconstructions import BLOCK_RECONSTRUCTIONS
from secateur.pruners.dense_walk import gram_bytes
from secateur.pruners.families.anatomy import Anatomy
from secateur.pruners.forward_kinds import n_bytes
from secateur.pruners.gradient_kinds import Kind
from secateur.pruners.gradients import check_gradients
from secateur.pruners.structure.depth import DEPTH
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.keys import BLEND
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.recipe.profiles import read_profile

if TYPE_CHECKING:
    from secateur.evaluators.workbench import Plan

Metric = Mapping[str, Any]


def check_names(plan: Plan) -> None:
    """Refuse metrics that the unit does not have, and a profile that can't be read."""
    for metric in _metrics(plan.space):
        try:
            GRADIENTS[plan.space.unit](metric)
        except ValueError as error:
            raise ValueError(f"`space.metrics`: {error}") from error
    if plan.space.profile is not None:
        read_profile(Path(plan.space.profile))


def check_memory_for_gradients(plan: Plan, anatomy: Anatomy) -> None:
    """Refuse metrics whose gradients this machine has no memory for."""
    for metric in _metrics(plan.space):
        kinds = GRADIENTS[plan.space.unit](metric)
        if kinds:
            check_gradients(anatomy, kinds, plan.space.length[-1])


def check_cache(plan: Plan, anatomy: Anatomy) -> None:
    """Refuse a cache of statistics that does not hold those of one choice of calibration data.

    Raises:
        ValueError: with the size that will do.
    """
    space, n_weights = plan.space, sum(linear.n_weights for linear in anatomy.linears)
    kinds = {kind for metric in _metrics(space) for kind in GRADIENTS[space.unit](metric)}
    needed = max((n_bytes(kind) * n_weights for kind in kinds), default=0)
    fitted = "repair" in space.search and {*space.repair_options} - {"none", "bias"}
    if space.unit != "blocks" and fitted:
        needed = max(needed, gram_bytes(anatomy))
    if needed > space.cache_gb * 1e9:
        raise ValueError(
            f"Expected `space.cache_gb` >= {needed / 1e9:.2g} for the statistics of one choice of calibration data, "
            f"got {space.cache_gb:g}."
        )


def _metrics(space: Any) -> Iterator[Metric]:
    """The sections ``metric`` that a search may come to, and those of the recipes that it measures first."""
    for name in (space.start_name, *space.known_names):
        yield completed({"unit": space.unit, "sparsity": 0.5, **KNOWN[name].form})["metric"]
    if "metric" in space.search:
        for name in space.metric_options:
            yield {"name": name, "order": "mixed"} if name == BLEND else {"name": name}


def _of_weights(metric: Metric) -> tuple[Kind, ...]:
    if metric["name"] in BLOCK_RECONSTRUCTIONS:
        return ()
    return (blend_of(metric) or method_of(metric, damp=0.01, seed=0)).gradients


def _of_structure(metric: Metric) -> tuple[Kind, ...]:
    return importance_of(metric).gradients


def _of_blocks(metric: Metric) -> tuple[Kind, ...]:
    name, known = metric["name"], [SHORTGPT, *DEPTH]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ValueError(
            f"Expected `metric` of blocks to be one of {', '.join(known)}, got {name!r}. Did you mean {near!r}?"
        )
    return () if name == SHORTGPT else DEPTH[name].gradients


# By unit, the kinds of gradients that a metric needs.
GRADIENTS: dict[str, Callable[[Metric], tuple[Kind, ...]]] = {
    "weights": _of_weights,
    "structure": _of_structure,
    "blocks": _of_blocks,
}
