"""Methods of weight pruning: a metric that ranks weights, or a reconstruction that updates them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.formulas.evaluate import scores
from secateur.pruners.formulas.terminals import needs, terminals_of
from secateur.pruners.masks import prune_ranks
from secateur.pruners.models.anatomy import Linear
from secateur.pruners.stores.block_files import recorded
from secateur.spaces.formulas.tree import Tree, plain, terminals_in
from secateur.spaces.method import Comparison, Detail, MethodRow
from secateur.spaces.methods import METRICS, RECONSTRUCTIONS
from secateur.spaces.names import nearest


@dataclass(frozen=True)
class LayerProblem:
    """Layer that a reconstruction of weights works on.

    Args:
        weight: dense.
        inputs: with the statistics that the method needs.
        comparison: who competes with whom.
        group_size: of patterns; None: none.
        dampening: added to the second moment's diagonal, as a fraction of its mean, > 0.
        block_size: columns that are pruned together, where the method has that; a multiple of `group_size`.
        name: for errors.
        gradients: those of the weight that the method needs, by kind.
    """

    weight: Float[Tensor, "out in"]
    inputs: InputStatistics
    comparison: Comparison = "output"
    group_size: int | None = None
    dampening: float = 0.01
    block_size: int = 128
    name: str = "the weight"
    gradients: Mapping[Kind, Float[Tensor, "..."]] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """Settings of weight pruning: everything that decides a pruned weight except the sparsity and the data.

    Args:
        name: a metric or a reconstruction; for a formula any name, such as its text.
        comparison: who competes with whom; None = as the metric's paper has it.
        group_size: for `n_keep` of `group_size` patterns.
        dampening: of the Hessians of reconstructions and of formulas with H.
        block_size: of SparseGPT.
        seed: of the random metric.
        formula: a formula that is the metric; compared per output unless `comparison` says otherwise.

    Raises:
        ValueError: on an unknown name, or something that is no formula.
    """

    name: str
    comparison: Comparison | None = None
    group_size: int | None = None
    dampening: float = 0.01
    block_size: int = 128
    seed: int = 0
    formula: Tree | None = None

    def __post_init__(self) -> None:
        if self.formula is not None:
            needs(self.formula)  # checks it
            return
        known = [*METRICS, *RECONSTRUCTIONS]
        if self.name not in known and self.name not in METRICS:  # a path of one's own
            raise ValueError(
                f"Expected a known `metric`, got {self.name!r}.{nearest(self.name, known)} "
                "List them with `secateur list metrics`; a formula is written `formula: abs(W) * X`, a "
                "function of your own `package.module:function`."
            )
        if self.updates_weights and self.group_size is not None and not RECONSTRUCTIONS[self.name].patterns:
            can = ", ".join(name for name in known if name in METRICS or RECONSTRUCTIONS[name].patterns)
            raise ValueError(
                f"Expected no `group_size` with the metric {self.name}, got {self.group_size}. These can prune in "
                f"groups: {can}."
            )

        made_for = None if self.updates_weights else self._row.group
        if made_for is not None and self.group_size not in (None, made_for):
            raise ValueError(
                f"Expected `group_size` {made_for}, which the metric {self.name} is made for, got {self.group_size}. "
                f"Use {made_for}, or another metric."
            )

    @property
    def record(self) -> dict[str, Any]:
        """All fields as plain values, for hashes and records; without `program` where there is none."""
        record = recorded({x.name: getattr(self, x.name) for x in fields(self) if x.name != "formula"})
        return record if self.formula is None else record | {"program": plain(self.formula)}

    @property
    def updates_weights(self) -> bool:
        """True of reconstructions: a level is weights, not a part of a ranking."""
        return self.formula is None and self.name in RECONSTRUCTIONS

    @property
    def needs(self) -> Detail:
        """Required statistics of inputs."""
        if self.formula is not None:
            return needs(self.formula)[0]
        return self._row.inputs

    @property
    def gradients(self) -> tuple[Kind, ...]:
        """Required kinds of gradients of the dense model."""
        if self.formula is not None:
            return needs(self.formula)[1]
        return self._row.gradients

    @property
    def source(self) -> str | None:
        """Hash of the source of the metric's or reconstruction's function; None of a formula."""
        return None if self.formula is not None else self._row.source

    @property
    def _row(self) -> MethodRow:
        return RECONSTRUCTIONS[self.name] if self.updates_weights else METRICS[self.name]

    @property
    def _formula(self) -> Tree | None:
        """The formula, given or of a metric that is a formula."""
        if self.formula is not None or self.name in RECONSTRUCTIONS:
            return self.formula
        score = METRICS[self.name].function
        return None if callable(score) else score

    def ranks(
        self,
        linear: Linear,
        inputs: InputStatistics | None,
        levels: Sequence[float],
        whole: ModelStatistics | None = None,
    ) -> UInt8[Tensor, "out in"]:
        """First level at which each weight is pruned; see `masks.prune_ranks`. Metrics only.

        Raises:
            FormulaError: if the formula gives no ranking of this layer's weights.
        """
        return prune_ranks(
            self.scores(linear, inputs, whole),
            levels,
            comparison=self.compares,
            group_size=self.group_size,
            name=linear.name,
        )

    @property
    def compares(self) -> Comparison:
        """Who competes with whom."""
        return self.comparison or (self._row.comparison if self.formula is None else None) or "output"

    def scores(
        self, linear: Linear, inputs: InputStatistics | None, whole: ModelStatistics | None = None
    ) -> Float[Tensor, "out in"]:
        """Importance of each weight, higher = keep. Metrics only.

        Raises:
            FormulaError: if the formula gives no ranking of this layer's weights.
        """
        formula = self._formula
        if formula is None:
            digest = hashlib.sha256(f"{self.seed}/{linear.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            further: dict[str, Any] = {}
            if self.gradients:
                assert whole is not None, "collected where the table says that the metric needs gradients"
                found = self._gradients(linear, whole)
                further = {"gradients": found, "windows": whole.windows, "dampening": self.dampening}
            scored: Tensor = METRICS[self.name].function(linear.weight, inputs, generator, **further)
            return scored
        return scores(
            formula,
            terminals_of(linear, terminals_in(formula), inputs, whole, dampening=self.dampening),
            (linear.out_features, linear.in_features),
            comparison=self.compares,
            group_size=self.group_size,
            name=linear.name,
        )

    def _gradients(self, linear: Linear, whole: ModelStatistics | None) -> dict[Kind, Float[Tensor, "..."]]:
        """Those of a projection that are needed."""
        if not self.gradients:
            return {}
        assert whole is not None, "collected where the table says that the method needs gradients"
        return {kind: whole.gradients[kind][linear.name] for kind in self.gradients}

    def weights(
        self,
        linear: Linear,
        inputs: InputStatistics | None,
        sparsities: Sequence[float],
        whole: ModelStatistics | None = None,
    ) -> Float[Tensor, "levels out in"]:
        """Pruned weight at each sparsity."""
        if self.updates_weights:
            assert inputs is not None
            settings = self.compares, self.group_size, self.dampening, self.block_size
            layer = LayerProblem(
                linear.weight, inputs, *settings, linear.name, self._gradients(linear, whole)
            )
            found: Tensor = RECONSTRUCTIONS[self.name].function(layer, sparsities)
            return found
        levels = sorted({0.0, *sparsities})
        ranks = self.ranks(linear, inputs, levels, whole)
        return torch.stack([linear.weight * (ranks > levels.index(sparsity)) for sparsity in sparsities])
