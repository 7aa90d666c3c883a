"""Allocations from a file: shares that another search found, or an order of sub-layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.pruners.recipes.allocation.filling import check_reach, in_order, to_budget, wanted_weights
from secateur.pruners.recipes.allocation.layers import Entry, Ints, Layer, Profile, RuleEvidence
from secateur.spaces.limited_text import cut, parse_yaml, read_text

KEYS = ("block", "kind", "linear", "sparsity")
FORM = (
    "Write lines such as `- {block: 3, kind: mlp, sparsity: 0.4}` or `- {linear: NAME, sparsity: 0.4}`, or keep what "
    "`secateur pick RUN --json` prints."
)
PICKED = "sparsity_of"


def read_profile(path: Path) -> Profile:
    """The lines of a YAML or JSON file: a list of mappings with keys out of `KEYS`.

    A line with ``linear`` needs no block; one with neither ``kind`` nor ``linear`` means the whole block. Instead of a
    list the file may hold one mapping from full names of linears to shares, by itself or as `PICKED`.

    Raises:
        ValueError: if there is no such file, or it says something else.
    """
    raw = _load(path)
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"Expected `profile` to hold a list with a line or more, got {path}. {FORM}")
    entries = tuple(_entry(line, f"line {number} of {path}") for number, line in enumerate(raw, 1))
    seen: set[tuple[object, ...]] = set()
    for entry in entries:
        if entry[:3] in seen:
            raise ValueError(f"Expected each line of `profile` once, got {_said(entry)} again in {path}.")
        seen.add(entry[:3])
    return entries


def _load(path: Path) -> Any:
    """Content of the file; a mapping to shares as lines."""
    try:
        text = read_text(path, "a profile")
        try:  # ten times as fast, for models of many linears
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raw = parse_yaml(text, str(path))
    except ValueError as error:
        raise ValueError(
            f"Expected `profile` to be a YAML or JSON file, got {path}: {error} {FORM}"
        ) from None
    shares = raw.get(PICKED, raw) if isinstance(raw, dict) else None
    return [{"linear": key, "sparsity": x} for key, x in shares.items()] if isinstance(shares, dict) else raw


def _entry(line: Any, where: str) -> Entry:
    if not isinstance(line, dict) or not set(line) <= set(KEYS):
        raise ValueError(
            f"Expected keys out of {', '.join(KEYS)}, got {cut(repr(line), 60)} at {where}. {FORM}"
        )
    block, kind, linear, sparsity = (line.get(key) for key in KEYS)
    if linear is None and (type(block) is not int or block < 0):
        raise ValueError(
            f"Expected `block` to be an index from 0 on, got {cut(repr(block), 60)} at {where}. {FORM}"
        )
    if kind not in (None, "attention", "mlp"):
        raise ValueError(f"Expected `kind` to be attention or mlp, got {cut(repr(kind), 60)} at {where}.")
    if linear is not None and not isinstance(linear, str):
        raise ValueError(
            f"Expected `linear` to be the name of a linear, got {cut(repr(linear), 60)} at {where}."
        )
    is_number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if sparsity is not None and not (is_number and 0 <= sparsity <= 1):
        raise ValueError(
            f"Expected `sparsity` within [0, 1], got {cut(repr(sparsity), 60)} at {where}. It is a share."
        )
    return Entry(block, kind, None, sparsity) if linear is None else Entry(None, None, linear, sparsity)


def _said(entry: Entry) -> str:
    said = {key: value for key, value in zip(KEYS, entry, strict=True) if value is not None}
    return ", ".join(f"{key} {value}" for key, value in said.items())


def shares_of_file(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float) -> Ints:
    """The shares that a file gives, all scaled by one factor where they miss the budget.

    For results of EvoPress (Sieberling et al. 2025, arXiv 2410.14649) or DarwinLM (Tang et al. 2025, arXiv 2502.07780).
    The lines that say most about a layer count: its linears' before its sub-layer's before its block's; of several
    their mean.

    Raises:
        ValueError: if a line is about nothing in the model, a layer that may go has no line, or a line no sparsity.
    """
    found: list[list[float]] = [[] for _ in layers]
    for precision in range(3):
        lines = [entry for entry in evidence.profile if _precision(entry) == precision]
        for index, shares in _shares(lines, layers).items():
            found[index] = shares
    for layer, shares in zip(layers, found, strict=True):
        if layer.n_free and not shares:
            raise ValueError(f"Expected a line of `profile` for each layer, got none for {layer}. Add one.")
    return to_budget(layers, [float(np.mean(shares or [0.0])) for shares in found], sparsity)


def _shares(lines: Sequence[Entry], layers: Sequence[Layer]) -> dict[int, list[float]]:
    """Shares that these lines give to each of their layers."""
    found: dict[int, list[float]] = {}
    for entry in lines:
        if entry.sparsity is None:
            raise ValueError(f"Expected `sparsity` in each line of `profile`, got none for {_said(entry)}.")
        for index in _matches(entry, layers):
            found.setdefault(index, []).append(entry.sparsity)
    return found


def prefix(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float) -> Ints:
    """Whole sub-layers in the order of a file, as many as the budget allows; the next one in part.

    For results of BlockPruner (Zhong et al. 2025, arXiv 2406.10594) and FinerCut (Zhang et al. 2024, arXiv 2405.18218):
    one order serves all budgets. In part, because whole sub-layers would miss the budget.

    Args:
        layers: sub-layers; of the next one the units that score least go.
        evidence: with a profile, whose order alone counts.

    Raises:
        ValueError: if a line is about nothing in the model.
        BudgetError: if all that the file names is not enough.
    """
    wanted = wanted_weights(layers, sparsity)
    times = [np.full(layer.n_free, np.inf) for layer in layers]
    for place, entry in enumerate(evidence.profile):
        for index in _matches(entry, layers):
            if np.isinf(times[index]).all():
                times[index] = place + np.arange(layers[index].n_free) / layers[index].n_units
    named = [bool(np.isfinite(row).all()) for row in times]
    check_reach([layer for layer, is_named in zip(layers, named, strict=True) if is_named], wanted, layers)
    return in_order(layers, [row[np.isfinite(row)] for row in times], wanted)


def _precision(entry: Entry) -> int:
    """Precision of a line: 0 for a block, 1 for a sub-layer, 2 for a linear."""
    return 2 if entry.linear is not None else int(entry.kind is not None)


def _matches(entry: Entry, layers: Sequence[Layer]) -> list[int]:
    """The layers of a line."""
    found = [index for index, layer in enumerate(layers) if _is_about(entry, layer)]
    if not found:
        raise ValueError(
            f"Expected each line of `profile` to be about a layer of the model, got {_said(entry)}. Its layers are "
            f"named {layers[0]} to {layers[-1]}."
        )
    return found


def _is_about(entry: Entry, layer: Layer) -> bool:
    if entry.linear is not None:
        return entry.linear in (layer.name, *layer.linears)
    return entry.block == layer.block and entry.kind in {None, layer.kind}
