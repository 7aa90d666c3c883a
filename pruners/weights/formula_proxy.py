"""Error of some layers' outputs under a formula's masks, from stored second moments: no forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruners.formulas.terminals import Terminals, some_rows, spread
from secateur.pruners.weights.formula_layers import FormulaLayers
from secateur.pruners.weights.formula_store import Grams
from secateur.spaces.formulas.settings import FormulaSettings
from secateur.spaces.formulas.tree import Tree


@dataclass(frozen=True)
class _Sample:
    """Some rows of a projection.

    Args:
        name: of the projection.
        terminals: of these rows, or of the whole projection where its rows compete.
        rows: among those of the terminals.
        weight: of the rows.
        gram: see `squared_output`.
        whole: `squared_output` of the weight.
        outputs: second moment of the gradients of the rows' outputs, times the rows that each stands for; None: not
            by the curvature.
    """

    name: str
    terminals: Terminals
    rows: Tensor
    weight: Float[Tensor, "rows in"]
    gram: Float[Tensor, "..."]
    whole: float
    outputs: Float[Tensor, "rows rows"] | None = None


class FormulaProxy:
    """Relative output error of a formula's masks, mean over projections, or the loss that the curvature foretells.

    ``sqrt(tr((W - W*M) G (W - W*M)^T) / tr(W G W^T))`` of each projection, on evenly spread blocks and rows. Of the
    closed forms tried it orders formulas most like the true loss does; by construction it favours formulas like
    Wanda's, which minimises its diagonal form weight by weight, so candidates are finally measured on data.

    By the curvature: ``tr(B (W - W*M) G (W - W*M)^T) / 2``, summed over projections, B the second moment of the
    gradients of the outputs (K-FAC, arXiv 1503.05671), in nats a token.

    In minmax, zscore and rank a formula sees the chosen rows alone. Where the rows of a layer compete, all are scored.

    Args:
        layers: of the dense model.
        grams: the second moments that the store holds.
        rows: of each projection.
        outputs: B of each projection, whole, by its full name; None: relative errors.
    """

    def __init__(
        self,
        layers: FormulaLayers,
        grams: Grams,
        rows: int,
        outputs: Mapping[str, Float[Tensor, "out out"]] | None = None,
    ) -> None:
        self._layers, self._grams, self._rows, self._outputs = layers, grams, rows, outputs
        self._losses: dict[str, float] = {}  # by fingerprint

    @torch.no_grad()
    def loss(self, config: Mapping[str, Any]) -> float:
        """Error of the masks of a configuration; formulas with equal fingerprints share it.

        Raises:
            FormulaError: if the formula gives no ranking of some layer.
        """
        if not config["metric"]:
            return 0.0
        formula, digest = self._layers.marked(config)
        if digest not in self._losses:
            self._losses[digest] = self.error(formula, config["sparsity"])
        return self._losses[digest]

    def error(self, formula: Tree, sparsity: Mapping[str, float]) -> float:
        """Mean relative output error, or foretold loss, recomputed.

        Raises:
            FormulaError: if the formula gives no ranking of some layer.
        """
        errors = [self._error(formula, sample, sparsity[sample.name]) for sample in self.samples]
        return sum(errors) if self._outputs is not None else sum(errors) / len(errors)

    def _error(self, formula: Tree, sample: _Sample, sparsity: float) -> float:
        if sparsity <= 0:
            return 0.0
        kept = self._layers.mask(formula, sample.terminals, sparsity, sample.name)
        if sample.outputs is not None:
            gone = sample.weight.masked_fill(kept[sample.rows], 0)
            return squared_output(gone, sample.gram, sample.outputs) / 2
        return relative_output_error(sample.weight, kept[sample.rows], sample.gram, sample.whole)

    @cached_property
    def samples(self) -> list[_Sample]:
        """Rows that errors are computed on."""
        layers, grams = self._layers, self._layers.store.grams(self._grams)
        found = []
        rows_compete = layers.comparison == "layer" and layers.group_size is None
        for block in self._grams.blocks:
            for linear in layers.anatomy.blocks[block].linears:
                terminals = layers.terminals(linear)
                rows = spread(len(terminals["W"]), self._rows)
                weight, gram = terminals["W"][rows], grams[linear.name].to(terminals["W"].device)
                outputs = None
                if self._outputs is not None:
                    moment = self._outputs[linear.name].to(weight)
                    outputs = moment[rows][:, rows] * (len(moment) / len(rows))
                if not rows_compete:
                    terminals, rows = some_rows(terminals, self._rows), torch.arange(len(rows))
                found.append(
                    _Sample(linear.name, terminals, rows, weight, gram, squared_output(weight, gram), outputs)
                )
        return found


def grams_of(settings: FormulaSettings, n_blocks: int) -> Grams | None:
    """Second moments that the proxy of the settings needs, of evenly spread blocks."""
    if settings.proxy is None:
        return None
    return Grams(tuple(spread(n_blocks, settings.proxy.blocks).tolist()), settings.proxy.gram)


def squared_output(
    weight: Float[Tensor, "rows in"],
    gram: Float[Tensor, "..."],
    outputs: Float[Tensor, "rows rows"] | None = None,
) -> float:
    """``tr(W G W^T)``: the mean over tokens of the squared norm of the rows' outputs; ``tr(B W G W^T)`` with a B.

    Args:
        weight: rows of a layer, or their pruned part.
        gram: mean over tokens of ``x x^T``, ``in in``; or its diagonal, ``in``, as if inputs were uncorrelated.
        outputs: B, symmetric; None: the identity.
    """
    seen = weight @ gram if gram.ndim == 2 else weight * gram
    weighed = weight if outputs is None else outputs @ weight
    return float(torch.dot(seen.reshape(-1), weighed.reshape(-1)))


def relative_output_error(
    weight: Float[Tensor, "rows in"],
    kept: Bool[Tensor, "rows in"],
    gram: Float[Tensor, "..."],
    whole: float,
) -> float:
    """``sqrt(tr((W - W*M) G (W - W*M)^T) / tr(W G W^T))``, the norm of the output's error over that of the output.

    The layer-wise error that SparseGPT reconstructs against (arXiv 2301.00774, eq. 1), relative.

    Args:
        weight: rows of a layer.
        kept: their mask.
        gram: see `squared_output`.
        whole: `squared_output` of the weight; a layer whose output is zero has no error.
    """
    missing = squared_output(weight.masked_fill(kept, 0), gram)
    return (max(missing, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
