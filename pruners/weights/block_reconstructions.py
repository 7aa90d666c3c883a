"""Methods that give the weights of all projections of a block together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.weights.sparsellm import Weights, check_gated, sparsellm


@dataclass(frozen=True)
class BlockReconstruction:
    """A row of the registry.

    Args:
        function: see `sparsellm`: from a dense block and what goes into it to its weights at given sparsities, pruned
            entries exactly zero, as many as `budget.n_zeros` says.
        check: raises a ValueError where it can't be used on a block with these calibration windows.
        summary: one line for people.
        paper: address.
    """

    function: Callable[..., Weights]
    check: Callable[[Anatomy, Block, Int[Tensor, "windows length"]], None]
    summary: str
    paper: str


BLOCK_RECONSTRUCTIONS: dict[str, BlockReconstruction] = {
    "sparsellm": BlockReconstruction(
        sparsellm,
        check_gated,
        "SparseGPT, with gate, up and down fitted to each other by turns",
        "https://arxiv.org/abs/2402.17946",
    ),
}
