"""What recipes cost, exactly, once it is known what goes and which biases come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.architecture.cost import cost
from secateur.spaces.shape import ModelShape


def cut_costs(shape: ModelShape, kept: Sequence[Kept], repair: Any = "none") -> dict[str, float]:
    """Costs of a model of which so much is kept, with the biases that a repair of structure adds."""
    return cost(shape, kept, repair)


def zero_costs(shape: ModelShape, n_zeros: int, n_weights: int, n_biases: int) -> dict[str, float]:
    """Costs of a model with so many zeros among so many prunable weights, and so many entries of new biases."""
    found = shape.with_zeros(n_zeros, n_weights)
    more = {"params": n_biases, "size_bytes": n_biases * shape.bytes_per_param}
    return {name: value + more.get(name, 0) for name, value in found.items()}
