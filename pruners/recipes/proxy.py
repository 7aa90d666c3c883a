"""Proxy for the loss of recipes: the loss that the curvature foretells of pruned weights, without a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.formulas.terminals import spread
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.pruner import OnBlock, no_report
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan
from secateur.pruners.weights.formula_proxy import squared_output
from secateur.pruners.weights.formula_store import (
    Grams,
    TerminalStore,
    build_outputs,
    build_terminals,
    identity_of,
    load_outputs,
    output_bytes,
    terminal_bytes,
)
from secateur.spaces.recipe.settings import RecipeProxySettings


def proxy_grams(anatomy: Anatomy, settings: RecipeProxySettings) -> Grams:
    """Second moments of inputs that the proxy needs."""
    return Grams(tuple(spread(len(anatomy.blocks), settings.blocks).tolist()), settings.gram)


def proxy_bytes(anatomy: Anatomy, grams: Grams) -> int:
    """Upper bound of the bytes that `build_proxy` writes; the model may be without memory."""
    return terminal_bytes(anatomy, (), grams) + output_bytes(anatomy, grams)


def build_proxy(
    directory: Path,
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    identity: str,
    grams: Grams,
    on_block: OnBlock = no_report,
) -> None:
    """Write the second moments of these blocks, unless they are there.

    Raises:
        LevelStoreError: if they can't be written.
        ValueError: if a gradient is not finite.
    """
    build_outputs(directory, anatomy, tokens, identity_of(identity), grams)
    build_terminals(directory, anatomy, tokens, (), identity_of(identity), grams=grams, on_block=on_block)


class RecipeProxy:
    """Foretold loss of a plan that zeros weights, in nats a token: 0 for the dense model.

    ``tr(B D A D^T) / 2``, summed over the projections of some blocks and scaled to all of them: D the change of the
    weights, A the second moment of the projection's inputs, B that of the gradients of its outputs for labels drawn
    from the model's own distribution (K-FAC, arXiv 1503.05671). Biases that a repair adds are left out.

    Args:
        directory: that `build_proxy` wrote.
        anatomy: the dense model.
        grams: see `proxy_grams`.

    Raises:
        LevelStoreError: if the directory does not hold them.
    """

    def __init__(self, directory: Path, anatomy: Anatomy, grams: Grams) -> None:
        self._blocks = grams.blocks
        self._scale = len(anatomy.blocks) / len(grams.blocks)
        self._inputs = TerminalStore(directory, anatomy, ()).grams(grams)
        self._outputs = load_outputs(directory, grams)

    @torch.no_grad()
    def loss(self, plan: PruningPlan, live: Sequence[LiveBlock]) -> float:
        """Foretold loss; the model is dense, and is restored."""
        return self._scale * sum(
            self._of_block(plan, live[index]) for index in self._blocks if plan.keys[index] != DENSE
        )

    def _of_block(self, plan: PruningPlan, live: LiveBlock) -> float:
        dense = {linear.name: linear.weight for linear in live.block.linears}
        total = 0.0
        try:
            plan.change(live)
            for linear in live.block.linears:
                gone = dense[linear.name].float() - linear.weight.float()
                moments = (x[linear.name].to(gone) for x in (self._inputs, self._outputs))
                total += squared_output(gone, *moments) / 2
        finally:
            live.restore()
        return total
