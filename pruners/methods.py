"""Pruning methods by name: a metric that scores weights, or a reconstruction that also updates them."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.pruners.families.anatomy import Linear
from secateur.pruners.masks import Comparison, prune_ranks
from secateur.pruners.metrics import METRICS
from secateur.pruners.sparsegpt import sparsegpt
from secateur.pruners.statistics import InputStatistics

RECONSTRUCTIONS: dict[str, tuple[str, str]] = {
    "sparsegpt": ("blocked optimal brain surgery with weight update", "https://arxiv.org/abs/2301.00774"),
}
"""Methods that update the weights that stay: summary and paper."""


@dataclass(frozen=True)
class Method:
    """How weights go: everything that decides a pruned weight except the sparsity and the data.

    Args:
        name: a metric or a reconstruction.
        comparison: who competes with whom; None = as the metric's paper has it.
        group_size: for `n_keep` of `group_size` patterns.
        damp, block_size: of SparseGPT.
        seed: of the random metric.

    Raises:
        ValueError: on an unknown name.
    """

    name: str
    comparison: Comparison | None = None
    group_size: int | None = None
    damp: float = 0.01
    block_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        known = [*METRICS, *RECONSTRUCTIONS]
        if self.name not in known:
            near = difflib.get_close_matches(self.name, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"Expected `metric` to be one of {', '.join(known)}, got {self.name!r}. Did you mean {near!r}? "
                "List them with `secateur list metrics`."
            )

    @property
    def updates_weights(self) -> bool:
        """True if a level is weights, not just a mask."""
        return self.name in RECONSTRUCTIONS

    @property
    def needs(self) -> Literal["nothing", "moments", "gram"]:
        """Input statistics that it needs."""
        return "gram" if self.updates_weights else METRICS[self.name].needs

    def ranks(
        self, linear: Linear, inputs: InputStatistics | None, levels: Sequence[float]
    ) -> UInt8[Tensor, "out in"]:
        """For each weight the first level at which it goes; see `masks.prune_ranks`. Metrics only."""
        metric = METRICS[self.name]
        digest = hashlib.sha256(f"{self.seed}/{linear.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return prune_ranks(
            metric.score(linear.weight, inputs, generator),
            levels,
            comparison=self.comparison or metric.comparison,
            group_size=self.group_size,
            name=linear.name,
        )

    def weights(
        self, linear: Linear, inputs: InputStatistics | None, sparsities: Sequence[float]
    ) -> Float[Tensor, "levels out in"]:
        """The pruned weight at each sparsity."""
        if self.updates_weights:
            assert inputs is not None
            return sparsegpt(
                linear.weight,
                inputs,
                sparsities,
                group_size=self.group_size,
                block_size=self.block_size,
                damp=self.damp,
                name=linear.name,
            )
        levels = sorted({0.0, *sparsities})
        ranks = self.ranks(linear, inputs, levels)
        return torch.stack([linear.weight * (ranks > levels.index(sparsity)) for sparsity in sparsities])
