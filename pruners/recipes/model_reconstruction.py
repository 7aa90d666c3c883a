"""Weight pruning by a reconstruction of the model at once, under its own threshold or with given shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from secateur.pruners.models.anatomy import Block
from secateur.pruners.models.cutting import Piece
from secateur.pruners.recipes.plan import key_of
from secateur.pruners.recipes.weight_pruning import Counts, WeightPruning
from secateur.spaces.methods import MODEL_RECONSTRUCTIONS


@dataclass(frozen=True)
class ModelReconstruction(WeightPruning):
    """Weights by a reconstruction of the whole model, made at the first use and held as long as the plan.

    Args:
        name: a row of `MODEL_RECONSTRUCTIONS`.
    """

    name: str
    _made: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def spread(self, sparsity: float) -> Counts:
        """Zeros of each projection under one threshold for all; the live model must be dense."""
        weights = self._run(sparsity)
        counts = {x.name: 0 for x in self.context.anatomy.linears}
        counts |= {name: int((weight == 0).sum()) for name, weight in weights.items()}
        self._made[self._of(counts)] = weights
        return counts

    def key(self, block: Block, counts: Counts) -> str:
        self._weights(counts)  # while the model is dense
        return self._of(counts)

    def pieces(self, block: Block, key: str, counts: Counts) -> Mapping[str, Piece]:
        weights = self._weights(counts)
        return {x.name: Piece(weights[x.name], x.bias) for x in block.linears if x.name in weights}

    def _of(self, counts: Counts) -> str:
        """Key of all blocks: whatever is pruned elsewhere changes a block's weights."""
        zeros = [counts[linear.name] for linear in self.context.anatomy.linears]
        return key_of(self.name, self.sample.sha256, self.context.dampening, zeros)

    def _weights(self, counts: Counts) -> Mapping[str, Tensor]:
        key = self._of(counts)
        if key not in self._made:
            linears = self.context.anatomy.linears
            self._made[key] = self._run({x.name: counts[x.name] / x.n_weights for x in linears})
        return self._made[key]

    def _run(self, sparsity: float | Mapping[str, float]) -> Mapping[str, Tensor]:
        row = MODEL_RECONSTRUCTIONS[self.name]
        row.check(self.context.anatomy)
        asked = sorted(sparsity.items()) if isinstance(sparsity, Mapping) else sparsity
        seen = f"{self.name}-{key_of(asked, sorted(self.context.protected))}"
        further = {"state": self.sample.statistics.state(seen)} if row.trains else {}
        found: Mapping[str, Tensor] = row.function(
            self.context.anatomy,
            self.sample.tokens,
            sparsity,
            dampening=self.context.dampening,
            protected=self.context.protected,
            **further,
        )
        return found
