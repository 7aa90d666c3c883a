"""Checks of recipes before minutes of work: names, the model's family, memory and disk for statistics."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.pruners.calibration.collected import gram_bytes
from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.gradients import check_gradients
from secateur.pruners.calibration.pass_kinds import n_bytes
from secateur.pruners.calibration.stream import most
from secateur.pruners.masks import check_group_size
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.shape import prunables
from secateur.pruners.recipes.allocation.profile import read_profile
from secateur.pruners.recipes.experts import check_mixtures
from secateur.pruners.recipes.metric import importance_of
from secateur.pruners.recipes.retraining import check_training
from secateur.pruners.structure.method import check_importance_on
from secateur.spaces.formulas.metric import formula_of, needs_contrast
from secateur.spaces.method import CONTRAST, Detail, Unit
from secateur.spaces.methods import (
    BLOCK_RECONSTRUCTIONS,
    IMPORTANCES,
    MODEL_RECONSTRUCTIONS,
    REPAIRS,
    STREAM_REPAIRS,
    UNIT_RECONSTRUCTIONS,
    metrics_of,
)
from secateur.spaces.names import nearest
from secateur.spaces.recipe.form import completed, flattened
from secateur.spaces.recipe.keys import BLEND, BLENDED
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.recipe.schedule import trains
from secateur.spaces.shape import split_protected

STATE_BYTES = 16
"""Bytes a weight of a schedule's state: the last round's weights, and those in training with two moments."""

Metric = Mapping[str, Any]


def check_names(settings: Any) -> None:
    """Refuse metrics that the unit does not have, and a profile that can't be read."""
    for metric in _metrics(settings):
        try:
            needs_of(settings.unit, metric)
        except ValueError as error:
            raise ValueError(f"`space.metrics`: {error}") from error
    if settings.profile is not None:
        read_profile(Path(settings.profile))


def check_second(space: Any, sources: Collection[str]) -> None:
    """Refuse metrics over two calibration texts where there is one, if a search starts from them or may choose them."""
    start = _whole(space.start_name, space.unit)["metric"]["name"]
    for name in (start, *(space.metric_options if "metric" in space.search else ())):
        if CONTRAST not in sources and needs_contrast(name, space.unit):
            raise ValueError(
                f"Expected a second calibration text for the metric {name}, got none. Name it in "
                "`evaluator.data.contrast`."
            )


def check_family(space: Any, anatomy: Anatomy) -> None:
    """Refuse methods that the model's family lacks, where a search starts from them or may choose them.

    A published recipe that is only measured first becomes an infeasible measurement with that reason instead.

    Raises:
        ValueError: with the first block that does not fit.
    """
    if space.unit == "experts":
        check_mixtures(anatomy)
    start = _whole(space.start_name, space.unit)
    if trains(flattened(start)) or _may_train(space):
        check_training(anatomy, space.length[-1])
    metrics = [start["metric"]]
    metrics += [{"name": name} for name in space.metric_options] if "metric" in space.search else []
    repairs = {start["repair"], *(space.repair_options if "repair" in space.search else ())}
    _check_methods(metrics, repairs, anatomy, (space.samples[0], space.length[0]))
    for size in (start["metric"].get("group_size", 0), *(space.group_size or ())):
        check_pattern({"group_size": size}, _free(anatomy, space.protect))


def _check_methods(
    metrics: Collection[Metric], repairs: Collection[str], anatomy: Anatomy, windows: tuple[int, int]
) -> None:
    """Refuse methods by the checks of their rows; `windows`: number and length of those of the calibration."""
    tokens, names = torch.zeros(*windows, dtype=torch.int64), {metric["name"] for metric in metrics}
    for name in sorted(BLOCK_RECONSTRUCTIONS.keys() & names):
        for block in anatomy.blocks:
            BLOCK_RECONSTRUCTIONS[name].check(anatomy, block, tokens)
    for name in sorted(MODEL_RECONSTRUCTIONS.keys() & names):
        MODEL_RECONSTRUCTIONS[name].check(anatomy)
    for metric in metrics:
        if (row := UNIT_RECONSTRUCTIONS.get(metric["name"])) is not None:
            row.check(anatomy, **row.values(metric))
    for name in sorted(IMPORTANCES.keys() & names):
        check_importance_on(name, anatomy)
    for name in sorted(STREAM_REPAIRS.keys() & repairs):
        STREAM_REPAIRS[name].check(anatomy, find_layouts(anatomy, experts=True))


def check_statistics(space: Any, anatomy: Anatomy) -> None:
    """Refuse methods beyond this machine's memory, and a cache too small for one choice of calibration data.

    Raises:
        ValueError: with how much memory, or how large a cache, it takes.
    """
    n_weights = sum(linear.n_weights for linear in anatomy.linears)
    needed = gram_bytes(anatomy) if "gram" in _inputs(space) else 0
    if _may_train(space) or any(trains(flattened(form)) for form in _known(space)):
        needed = max(needed, STATE_BYTES * n_weights)
    for metric in _metrics(space):
        kinds = _kinds(space.unit, metric, forward=space.gradients == ["forward"])
        check_gradients(anatomy, kinds, space.length[-1])
        needed = max(needed, sum(map(n_bytes, kinds)) * n_weights)  # cached together
    if needed > space.cache_gb * 1e9:
        raise ValueError(
            f"Expected `space.cache_gb` >= {math.ceil(needed / 1e6) / 1e3:g} for the statistics of one choice of "
            f"calibration data, got {space.cache_gb:g}."
        )


def check_recipe(recipe: Mapping[str, Any], anatomy: Anatomy, protect: Sequence[str] = ()) -> None:
    """Refuse a complete plain form for a model that its methods do not fit, or whose gradients there is no memory for.

    Args:
        recipe: the form.
        anatomy: of the model.
        protect: patterns of names of the projections that stay dense.

    Raises:
        ValueError: with what is missing, or how much memory it takes.
    """
    if recipe["unit"] == "experts":
        check_mixtures(anatomy)
    calibration = recipe["calibration"]
    if trains(flattened(recipe)):
        check_training(anatomy, calibration["length"])
    windows = calibration["samples"], calibration["length"]
    _check_methods([recipe["metric"]], [recipe["repair"]], anatomy, windows)
    check_pattern(recipe["metric"], _free(anatomy, protect))
    forward = calibration.get("gradients") == "forward"
    check_gradients(anatomy, _kinds(recipe["unit"], recipe["metric"], forward=forward), calibration["length"])


def _free(anatomy: Anatomy, protect: Sequence[str]) -> list[Linear]:
    """Projections that are not protected."""
    names = {x.name for x in split_protected(prunables(anatomy), protect)[0]}
    return [x for x in anatomy.linears if x.name in names]


def check_pattern(metric: Metric, linears: Iterable[Linear]) -> None:
    """Refuse a `group_size` that does not divide the inputs of each of these projections."""
    if size := metric.get("group_size"):
        for linear in linears:
            check_group_size(linear.in_features, size, linear.name)


def _kinds(unit: Unit, metric: Metric, *, forward: bool) -> tuple[Kind, ...]:
    """The kinds of gradients that a metric needs; signed means may be estimated `forward`."""
    _, kinds = needs_of(unit, metric)
    return ("forward",) if forward and kinds == ("mean",) else kinds


def _may_train(space: Any) -> bool:
    """True if the search may choose a schedule that trains."""
    return space.schedule is not None and space.schedule.trains


def _known(space: Any) -> Iterator[Mapping[str, Any]]:
    """The recipe that a search starts from, and those that are measured first."""
    for name in (space.start_name, *space.known_names):
        yield _whole(name, space.unit)


def _whole(name: str, unit: Unit) -> Mapping[str, Any]:
    """The complete plain form of a published recipe."""
    return completed({"unit": unit, "sparsity": 0.5, **KNOWN[name].form})


def _metrics(space: Any) -> Iterator[Metric]:
    """The sections ``metric`` of all recipes in reach of a search, and of those that it measures first."""
    for form in _known(space):
        yield form["metric"]
    if "metric" in space.search:
        for name in space.metric_options:
            yield {"name": name, "order": "mixed"} if name == BLEND else {"name": name}


def _inputs(space: Any) -> set[Detail]:
    """The statistics of inputs that metrics and repairs take, likewise."""
    repairs = [form["repair"] for form in _known(space)]
    repairs += space.repair_options if "repair" in space.search else ()
    rows = REPAIRS[space.unit]
    return {needs_of(space.unit, metric)[0] for metric in _metrics(space)} | {rows[x].inputs for x in repairs}


def statistics_of(unit: Unit, forms: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], tuple[Kind, ...]]:
    """Largest statistics of one walk, as keyword arguments of `stream_blocks`, and all kinds of gradients of recipes.

    Args:
        forms: complete plain forms, of the same unit.
    """
    rows, details, kinds = REPAIRS[unit], set[Detail](), dict[Kind, None]()
    for form in forms:
        detail, gradients = needs_of(unit, form["metric"])
        repair = form.get("repair", "none")
        details |= {detail, rows[repair].inputs} if repair in rows else {detail}
        kinds |= dict.fromkeys(gradients)
    wanted = most(*details) if details else "nothing"
    name = "inputs" if unit == "weights" else "outputs"
    return ({} if wanted == "nothing" else {name: wanted}), tuple(kinds)


def needs_of(unit: Unit, metric: Metric) -> tuple[Detail, tuple[Kind, ...]]:
    """Statistics of inputs and kinds of gradients that a recipe's section ``metric`` needs.

    Raises:
        ValueError: if the unit does not have the metric.
    """
    name, rows = metric["name"], metrics_of(unit)
    if unit in BLENDED and (name == BLEND or formula_of(name) is not None):
        found = importance_of(metric)
        return found.needs, found.gradients
    if name not in rows:
        raise ValueError(f"Expected a known `metric` of {unit}, got {name!r}.{nearest(name, rows)}")
    return rows[name].inputs, rows[name].gradients
