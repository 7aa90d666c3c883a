"""Inputs of allocation rules: the layers that share a budget, and further evidence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Kind = Literal["attention", "mlp"]
"""Sub-layers that rules tell apart: over tokens, and on each token alone."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def kind_of(mixer: str) -> Kind:
    """The sub-layer that a mixer of this kind counts as."""
    return "attention" if mixer in ("attention", "recurrent") else "mlp"


class BudgetError(ValueError):
    """A sparsity out of a rule's reach, which makes a candidate infeasible."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A row of alike units: a sub-layer with its KV groups or channels, or a linear with its weights.

    Args:
        block: index of its block.
        kind: the sub-layer that it is, or that the linear belongs to.
        size: weights of one unit; 1 where the units are single weights.
        n_units: number of units.
        scores: float64 (n_units,), the lowest are removed first; of a linear's weights a sample of any length. Any
            order. Empty where the rule needs none.
        keep: units that must be kept; all of them where the layer is protected.
        rest: weights that are removed with the last unit alone: norms and the bias of the output projection.
        name: of the linear, in full; "" for a sub-layer.
        linears: full names of a sub-layer's projections, by which files may speak of it.

    Raises:
        ValueError: if there is no unit, more must be kept than there are, or a score is not finite.
    """

    block: int
    kind: Kind
    size: int
    n_units: int
    scores: Floats = field(default_factory=lambda: np.zeros(0))
    keep: int = 0
    rest: int = 0
    name: str = ""
    linears: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1 or self.n_units < 1:
            raise ValueError(
                f"Expected `size` and `n_units` >= 1, got {self.size}, {self.n_units} at {self}."
            )
        if not 0 <= self.keep <= self.n_units:
            raise ValueError(f"Expected `keep` from 0 to {self.n_units}, got {self.keep} at {self}.")
        if not np.isfinite(self.scores).all():
            raise ValueError(
                f"Expected finite scores, got NaN or infinity at {self}. Check the calibration text."
            )

    def __str__(self) -> str:
        return self.name or f"block{self.block}.{self.kind}"

    @property
    def n_free(self) -> int:
        """Units that may be removed."""
        return self.n_units - self.keep

    @property
    def n_weights(self) -> int:
        """Weights of the whole layer in the budget."""
        return self.removed(self.n_units)

    def removed(self, n_gone: int) -> int:
        """Weights of so many units."""
        return n_gone * self.size + (self.rest if n_gone == self.n_units else 0)


def layers_sha256(layers: Sequence[Layer]) -> str:
    """Hash of layers with their scores."""
    digest = hashlib.sha256()
    for layer in layers:
        facts = (layer.name, layer.linears, layer.n_units, layer.size, layer.keep, layer.rest)
        digest.update(f"{facts}".encode() + layer.scores.tobytes())
    return digest.hexdigest()


class Entry(NamedTuple):
    """A line of a profile: the sparsity of a block, one of its sub-layers, or one of its linears.

    Args:
        block: index of the block; None where `linear` says it.
        kind: the sub-layer; None: both.
        linear: full name; None: all of the sub-layer.
        sparsity: removed share, in [0, 1]; None where only the order of the lines counts.
    """

    block: int | None
    kind: Kind | None = None
    linear: str | None = None
    sparsity: float | None = None


Profile = tuple[Entry, ...]


@dataclass(frozen=True)
class RuleEvidence:
    """Inputs of rules beyond the layers' scores; parts that the rule does not need may be missing.

    Args:
        influence: of each block: one minus the mean cosine between its input and output.
        flap: of each layer its units' standardised fluctuation, (n_units,) in any order.
        outliers: of each layer the share of its scores above `factor` times their mean. As published all of a block
            is counted together, and each of its linears has the block's share.
        profile: lines of a file.
        measured: of each layer what the rule's row measures (`MethodRow.measure`).
    """

    influence: tuple[float, ...] = ()
    flap: tuple[Floats, ...] = ()
    outliers: tuple[float, ...] = ()
    profile: Profile = ()
    measured: tuple[float, ...] = ()
