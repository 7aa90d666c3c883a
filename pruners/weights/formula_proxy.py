"""How much a formula's masks change the outputs of some layers: from stored second moments, no forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.formulas.probe import chosen_rows, some_rows
from secateur.pruners.formulas.terminals import Terminals
from secateur.pruners.weights.formula_layers import FormulaLayers
from secateur.pruners.weights.formula_store import Grams
from secateur.pruners.weights.output_error import relative_output_error, squared_output
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.formulas.settings import FormulaSettings
from secateur.spaces.formulas.tree import Tree


@dataclass(frozen=True)
class _Sample:
    """Some rows of a projection.

    Args:
        name: of the projection.
        terminals: what formulas are scored on: those rows', or the whole projection's where its rows compete.
        rows: which of these the error is computed on.
        weight: of them.
        gram: see `squared_output`.
        whole: `squared_output` of the weight.
    """

    name: str
    terminals: Terminals
    rows: Tensor
    weight: Float[Tensor, "rows in"]
    gram: Float[Tensor, "..."]
    whole: float


class FormulaProxy:
    """The relative output error of a formula's masks, mean over projections.

    ``sqrt(tr((W - W*M) G (W - W*M)^T) / tr(W G W^T))`` of each projection, on evenly spread blocks and rows. Of the
    closed forms tried it orders formulas most like the true loss does; by construction it favours formulas like
    Wanda's, which minimises its diagonal form weight by weight, so the last word is for data.

    In minmax, zscore and rank a formula sees the chosen rows alone. Where the rows of a layer compete, all are scored.

    Args:
        layers: of the dense model.
        grams: the second moments that the store holds.
        rows: of each projection.
    """

    def __init__(self, layers: FormulaLayers, grams: Grams, rows: int) -> None:
        self._layers = layers
        self._grams = grams
        self._rows = rows
        self._samples: list[_Sample] | None = None
        self._losses: dict[str, float] = {}  # by fingerprint

    @torch.no_grad()
    def loss(self, config: Mapping[str, Any]) -> float:
        """The error of a configuration's masks; formulas with equal masks of the probes have one.

        Raises:
            FormulaError: if the formula gives no ranking of some layer.
        """
        metric, sparsity = config["metric"], config["sparsity"]
        if not metric:
            return 0.0
        program = formula_of(metric)
        assert program is not None, "a candidate is a formula"
        digest = self._layers.fingerprint(program, max(sparsity.values()))
        if digest not in self._losses:
            self._losses[digest] = self.error(program, sparsity)
        return self._losses[digest]

    def error(self, program: Tree, sparsity: Mapping[str, float]) -> float:
        """The mean relative output error, computed anew.

        Raises:
            FormulaError: if the formula gives no ranking of some layer.
        """
        errors = [self._error(program, sample, sparsity[sample.name]) for sample in self._all()]
        return sum(errors) / len(errors)

    def _error(self, program: Tree, sample: _Sample, sparsity: float) -> float:
        if sparsity <= 0:
            return 0.0
        kept = self._layers.mask(program, sample.terminals, sparsity, sample.name)
        return relative_output_error(sample.weight, kept[sample.rows], sample.gram, sample.whole)

    def _all(self) -> list[_Sample]:
        if self._samples is None:
            self._samples = list(self._drawn())
        return self._samples

    def _drawn(self) -> Iterator[_Sample]:
        layers, grams = self._layers, self._layers.store.grams(self._grams)
        rows_compete = layers.comparison == "layer" and layers.group_size is None
        for block in self._grams.blocks:
            for linear in layers.anatomy.blocks[block].linears:
                found = layers.terminals(linear)
                rows = chosen_rows(found["W"].shape[0], self._rows)
                weight, gram = found["W"][rows], grams[linear.name].to(found["W"].device)
                terminals = found if rows_compete else some_rows(found, self._rows)
                within = rows if rows_compete else torch.arange(len(rows))
                yield _Sample(linear.name, terminals, within, weight, gram, squared_output(weight, gram))


def grams_of(settings: FormulaSettings, n_blocks: int) -> Grams | None:
    """The second moments that the proxy of the settings needs: of blocks that are evenly spread."""
    if settings.proxy is None:
        return None
    return Grams(spread(n_blocks, settings.proxy.blocks), settings.proxy.gram)


def spread(n_blocks: int, n: int) -> tuple[int, ...]:
    """Indices of `n` blocks, or of all that there are, evenly spread."""
    return tuple(torch.linspace(0, n_blocks - 1, min(n, n_blocks)).round().long().tolist())
