"""Proxy for the loss of recipes: the loss that the curvature foretells of pruned weights, without a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.fisher import walk_back
from secateur.pruners.curvature import Calls, squared_slopes
from secateur.pruners.formulas.terminals import spread
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.plan import DENSE, LiveBlock, PruningPlan
from secateur.pruners.stores.block_files import LevelStoreError, load_tensors, save_tensors
from secateur.spaces.recipe.proxied import RecipeProxySettings

FILE = "proxy.safetensors"

FEW_TOKENS = 2048
"""Tokens whose inputs and gradients are kept, of the first windows of the calibration set; at least one window."""


def proxy_blocks(anatomy: Anatomy, settings: RecipeProxySettings) -> list[int]:
    """Evenly spread blocks whose weights the proxy looks at."""
    found: list[int] = spread(len(anatomy.blocks), settings.blocks).tolist()
    return found


def proxy_bytes(anatomy: Anatomy, blocks: Sequence[int], length: int) -> int:
    """Upper bound of the bytes that `build_proxy` writes; the model may be without memory.

    Args:
        length: of a window, in tokens.
    """
    linears = [linear for index in blocks for linear in anatomy.blocks[index].linears]
    return 4 * max(FEW_TOKENS, length) * sum(x.in_features + x.out_features for x in linears)


def build_proxy(
    directory: Path,
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    identity: str,
    blocks: Sequence[int],
    seed: int,
) -> None:
    """Write inputs, and gradients of outputs, of these blocks' projections at few tokens, unless they are there.

    One forward and one backward pass of the dense model, for labels drawn from its own distribution.

    Raises:
        LevelStoreError: if they can't be written.
        ValueError: if a gradient is not finite.
    """
    whole = f"{identity} {list(blocks)} {seed}"
    if load_tensors(directory / FILE, whole) is not None:
        return
    names = {linear.name for index in blocks for linear in anatomy.blocks[index].linears}
    calls, found = Calls(), dict[str, Tensor]()
    some, drawn = tokens[: max(1, FEW_TOKENS // tokens.shape[1])], torch.Generator().manual_seed(seed)
    for block in walk_back(anatomy, some, calls.add, watched=names, drawn=drawn):
        for linear in block.linears:
            for number, (inputs, gradients) in enumerate(calls.of(linear.name)):
                found[f"{linear.name}|{number}|inputs"] = inputs.float().cpu().clone()
                found[f"{linear.name}|{number}|gradients"] = gradients.float().cpu().clone()
        calls.clear()
    found["n_tokens"] = torch.tensor(some.numel())
    save_tensors(directory / FILE, found, whole)


class RecipeProxy:
    """Foretold loss of a plan that zeros weights, in nats a token: 0 for the dense model.

    1/2 E[(g^T D x)^2], see `pruners.curvature`, summed over the projections of some blocks and scaled to all of them.
    Biases that a repair adds are left out.

    Args:
        directory: that `build_proxy` wrote.
        anatomy: the dense model.
        blocks: see `proxy_blocks`.

    Raises:
        LevelStoreError: if the directory does not hold it.
    """

    def __init__(self, directory: Path, anatomy: Anatomy, blocks: Sequence[int]) -> None:
        found = load_tensors(directory / FILE, identity=None)
        if found is None:
            raise LevelStoreError(
                f"Expected the proxy of recipes in {directory / FILE}. It is built by a search."
            )
        self._blocks = blocks
        self._scale = len(anatomy.blocks) / len(blocks) / int(found["n_tokens"])
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for key, inputs in found.items():
            name, _, part = key.rpartition("|")
            if part == "inputs":
                pair = inputs, found[f"{name}|gradients"]
                self._calls.setdefault(name.rpartition("|")[0], []).append(pair)

    @torch.no_grad()
    def loss(self, plan: PruningPlan, live: Sequence[LiveBlock]) -> float:
        """Foretold loss; the model is dense, and is restored."""
        changed = [index for index in self._blocks if plan.keys[index] != DENSE]
        return self._scale * sum(self._of_block(plan, live[index]) for index in changed)

    def _of_block(self, plan: PruningPlan, live: LiveBlock) -> float:
        dense = {linear.name: linear.weight for linear in live.block.linears}
        total = 0.0
        try:
            plan.change(live)
            for linear in live.block.linears:
                change = linear.weight.float() - dense[linear.name].float()
                for inputs, gradients in self._calls.get(linear.name, ()):
                    total += squared_slopes(inputs.to(change), gradients.to(change), change) / 2
        finally:
            live.restore()
        return total
