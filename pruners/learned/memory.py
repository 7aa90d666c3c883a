"""Memory that the training of masks takes."""

from __future__ import annotations

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.memory import check_memory
from secateur.pruners.models.runner import fp32_bytes


def step_bytes(anatomy: Anatomy, batch: int, length: int) -> int:
    """About the memory of the activations of a step, for so many windows of so many tokens."""
    n_tokens = batch * length
    inside = 2 * n_tokens * sum(x.out_features for x in anatomy.linears)
    scores = sum(block.n_heads for block in anatomy.blocks) * n_tokens * length
    return 4 * (inside + scores)


def check_training_memory(anatomy: Anatomy, batch: int, length: int, n_values: int, what: str) -> None:
    """Refuse a training beyond this machine's memory.

    Args:
        batch: windows a step.
        length: tokens of a window.
        n_values: numbers that are held beside the model and the activations: trained ones, gradients, moments.
        what: method that trains, for the error.

    Raises:
        ValueError: with the memory that it takes.
    """
    check_memory(
        fp32_bytes(anatomy.model) + step_bytes(anatomy, batch, length) + 4 * n_values,
        anatomy.embedding.weight.device,
        f"the training of {what}",
        "Use shorter windows, or a method without training (`secateur list methods`).",
    )
