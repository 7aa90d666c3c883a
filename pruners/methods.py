"""Pruning methods by name: a metric that scores weights, or a reconstruction that also updates them."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.pruners.families.anatomy import Linear
from secateur.pruners.formulas.evaluate import scores
from secateur.pruners.formulas.program import Needs, Program, needs, used
from secateur.pruners.formulas.terminals import terminals_of
from secateur.pruners.masks import Comparison, prune_ranks
from secateur.pruners.metrics import METRICS
from secateur.pruners.sparsegpt import sparsegpt
from secateur.pruners.statistics import InputStatistics, ModelStatistics

RECONSTRUCTIONS: dict[str, tuple[str, str]] = {
    "sparsegpt": ("blocked optimal brain surgery with weight update", "https://arxiv.org/abs/2301.00774"),
}
"""Methods that update the weights that stay: summary and paper."""


@dataclass(frozen=True)
class Method:
    """How weights go: everything that decides a pruned weight except the sparsity and the data.

    Args:
        name: a metric or a reconstruction; for a formula any name, such as its text.
        comparison: who competes with whom; None = as the metric's paper has it.
        group_size: for `n_keep` of `group_size` patterns.
        damp: of the Hessians of SparseGPT and of formulas with H.
        block_size: of SparseGPT.
        seed: of the random metric.
        program: a formula that is the metric; compared per output unless `comparison` says otherwise.

    Raises:
        ValueError: on an unknown name, or something that is no program.
    """

    name: str
    comparison: Comparison | None = None
    group_size: int | None = None
    damp: float = 0.01
    block_size: int = 128
    seed: int = 0
    program: Program | None = None

    def __post_init__(self) -> None:
        if self.program is not None:
            needs(self.program)  # checks it
            return
        known = [*METRICS, *RECONSTRUCTIONS]
        if self.name not in known:
            near = difflib.get_close_matches(self.name, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"Expected `metric` to be one of {', '.join(known)}, got {self.name!r}. Did you mean {near!r}? "
                "List them with `secateur list metrics`; a formula is written `formula: abs(W) * X`."
            )

    @property
    def record(self) -> dict[str, Any]:
        """All of it as plain values, for hashes and records; without `program` where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "program" or value is not None}

    @property
    def updates_weights(self) -> bool:
        """True if a level is weights, not just a mask."""
        return self.program is None and self.name in RECONSTRUCTIONS

    @property
    def needs(self) -> Literal["nothing", "moments", "gram"]:
        """Input statistics that it needs."""
        return self._needs.inputs

    @property
    def needs_gradients(self) -> bool:
        """True if it needs gradients of the dense model."""
        return self._needs.gradients

    @property
    def _needs(self) -> Needs:
        if self.program is not None:
            return needs(self.program)
        return Needs("gram" if self.updates_weights else METRICS[self.name].needs, gradients=False)

    def ranks(
        self,
        linear: Linear,
        inputs: InputStatistics | None,
        levels: Sequence[float],
        whole: ModelStatistics | None = None,
    ) -> UInt8[Tensor, "out in"]:
        """For each weight the first level at which it goes; see `masks.prune_ranks`. Metrics only.

        Raises:
            FormulaError: if the formula gives no ranking of this layer's weights.
        """
        default: Comparison = "output" if self.program is not None else METRICS[self.name].comparison
        comparison = self.comparison or default
        return prune_ranks(
            self._scores(linear, inputs, whole, comparison),
            levels,
            comparison=comparison,
            group_size=self.group_size,
            name=linear.name,
        )

    def _scores(
        self,
        linear: Linear,
        inputs: InputStatistics | None,
        whole: ModelStatistics | None,
        comparison: Comparison,
    ) -> Float[Tensor, "out in"]:
        if self.program is None:
            digest = hashlib.sha256(f"{self.seed}/{linear.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            return METRICS[self.name].score(linear.weight, inputs, generator)
        return scores(
            self.program,
            terminals_of(linear, used(self.program), inputs, whole, damp=self.damp),
            (linear.out_features, linear.in_features),
            comparison=comparison,
            group_size=self.group_size,
            name=linear.name,
        )

    def weights(
        self,
        linear: Linear,
        inputs: InputStatistics | None,
        sparsities: Sequence[float],
        whole: ModelStatistics | None = None,
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
        ranks = self.ranks(linear, inputs, levels, whole)
        return torch.stack([linear.weight * (ranks > levels.index(sparsity)) for sparsity in sparsities])
