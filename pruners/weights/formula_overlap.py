"""Overlap of the masks of formulas with those of published metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.formulas.evaluate import FormulaError
from secateur.pruners.formulas.terminals import spread
from secateur.pruners.weights.formula_layers import FormulaLayers
from secateur.spaces.formulas.metric import formula_of

BLOCKS = 8
"""Number of compared blocks, evenly spread over the model."""

Masks = Mapping[str, Tensor]


@torch.no_grad()
def overlaps(layers: FormulaLayers, space: Any, candidates: Sequence[str]) -> dict[str, Any]:
    """Share of the pruned weights that a formula and a published one have in common, for each pair.

    All prune equally many, so it is symmetric; by chance it would be the sparsity. Mean over the projections of some
    blocks; formulas that are undefined there are left out.

    Args:
        layers: of the dense model.
        space: of formulas.
        candidates: canonical texts.

    Returns:
        Plain values: ``blocks`` that were compared, ``known`` texts by name, ``overlap`` by text, then by name.
    """
    known = {name: formula.text for name, formula in space.known.items()}
    texts = dict.fromkeys([*known.values(), *candidates])
    configs = {text: space.config(space.parse(text)) for text in texts}
    blocks = spread(len(layers.anatomy.blocks), BLOCKS).tolist()
    shares: dict[str, dict[str, list[float]]] = {}
    for block in blocks:
        masks = {text: _masks(layers, block, config) for text, config in configs.items()}
        for text, of_text in masks.items():
            for name, other in known.items():
                both = _shares(of_text, masks[other])
                shares.setdefault(text, {}).setdefault(name, []).extend(both)
    means = {
        text: {name: sum(found) / len(found) for name, found in by_name.items() if found}
        for text, by_name in shares.items()
    }
    return {"blocks": blocks, "known": known, "overlap": {text: m for text, m in means.items() if m}}


def _masks(layers: FormulaLayers, block: int, config: Mapping[str, Any]) -> Masks:
    """Masks of a block; none of the dense model, or where the formula is undefined."""
    formula = formula_of(config["metric"])
    try:
        return layers.masks(block, formula, config["sparsity"]) if formula is not None else {}
    except FormulaError:
        return {}


def _shares(masks: Masks, others: Masks) -> list[float]:
    """Common share of each projection that both prune."""
    return [
        float((~kept & ~others[name]).sum() / (~kept).sum())
        for name, kept in masks.items()
        if name in others and not bool(kept.all())
    ]
