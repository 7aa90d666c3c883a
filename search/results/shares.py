"""Removed shares: of the blocks, and of the whole model."""

from __future__ import annotations

from collections.abc import Mapping


def removed_shares(values: Mapping[str, float], n_params: float) -> dict[str, float]:
    """Removed shares of the parameters of a structured candidate, by what they are shares of: blocks, model.

    Args:
        values: its costs; their ``sparsity`` is the share of the blocks.
        n_params: of the whole dense model.
    """
    return {"blocks": values["sparsity"], "model": 1 - values["params"] / n_params}


def shares_words(shares: Mapping[str, float]) -> str:
    """Line about removed shares, e.g. ``30.1% of the blocks' parameters, 25.0% of the whole model's``."""
    return f"{shares['blocks']:.1%} of the blocks' parameters, {shares['model']:.1%} of the whole model's"
