"""Weight pruning of a block: by masks and repairs, or by reconstruction of layers or of the block."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.calibration.stream import most, stream_states
from secateur.pruners.masks import mask
from secateur.pruners.models.anatomy import Block, Linear
from secateur.pruners.models.cutting import Piece
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.metric import Ranking
from secateur.pruners.recipes.plan import key_of
from secateur.pruners.weights.mask_repairs import Masked
from secateur.pruners.weights.method import Method
from secateur.spaces.method import Detail, MethodRow
from secateur.spaces.methods import BLOCK_RECONSTRUCTIONS, MASK_REPAIRS

Counts = Mapping[str, int]
"""Zeros of each projection by its full name."""


@dataclass(frozen=True)
class WeightPruning(ABC):
    """From dense blocks, of a live model that need not be dense elsewhere, to weights with zeros.

    Args:
        context: of the recipe.
        sample: its calibration windows, with the statistics of `needs` and `gradients`.
    """

    context: RecipeContext
    sample: Sample

    @property
    def needs(self) -> Detail:
        """Statistics of inputs."""
        return "nothing"

    @property
    def gradients(self) -> tuple[Kind, ...]:
        """Kinds of gradients."""
        return ()

    @abstractmethod
    def key(self, block: Block, counts: Counts) -> str:
        """Equal for equal weights."""

    @abstractmethod
    def pieces(self, block: Block, key: str, counts: Counts) -> Mapping[str, Piece]:
        """The projections with zeros, pruned, by their full names; `key` is the result of `key`."""

    def n_biases(self, counts: Counts) -> int:
        """Entries of biases that the dense model does not have."""
        return 0

    def some_scores(self, linear: Linear, n: int) -> NDArray[np.float64]:
        """About so many of a projection's scores, evenly spread over its weights.

        Raises:
            ValueError: if it has none.
        """
        raise ValueError(f"Expected a metric with scores, got one that gives weights at {linear.name}.")

    def inputs(self, block: Block) -> Mapping[str, InputStatistics]:
        """Statistics of each projection's input, as far as they are needed."""
        if self.needs == "nothing":
            return {}
        return self.sample.statistics.inputs(block.index, gram=self.needs == "gram")


def spread_step(n_scores: int, n: int, width: int) -> int:
    """Distance between at most `n` of the scores, so that rows of this width are sampled in all columns alike."""
    step = -(-n_scores // n)
    while math.gcd(step, width) > 1:  # or each row would be sampled in the same few columns
        step += 1
    return step


@dataclass(frozen=True)
class MaskPruning(WeightPruning):
    """Weights of the lowest scores are zeroed, then the kept ones are repaired.

    Args:
        ranking: of the weights.
        repair: a row of `MASK_REPAIRS`.
        gone: True at weights that are zero already, by full name; they go first.
        group_size: of a pattern; None: none.
    """

    ranking: Ranking
    repair: str
    gone: Mapping[str, Bool[Tensor, "out in"]] = field(default_factory=dict)
    group_size: int | None = None

    @property
    def needs(self) -> Detail:
        return most(self.ranking.needs, self._row.inputs)

    @property
    def gradients(self) -> tuple[Kind, ...]:
        return self.ranking.gradients

    def some_scores(self, linear: Linear, n: int) -> NDArray[np.float64]:
        scores = self._scores(linear, self.inputs(self.context.anatomy.blocks[linear.block]))
        scores = scores[~self.gone[linear.name]] if linear.name in self.gone else scores.flatten()
        step = spread_step(len(scores), n, linear.weight.shape[1])
        spread: NDArray[np.float64] = scores[::step].double().cpu().numpy()
        return spread

    def key(self, block: Block, counts: Counts) -> str:
        masks = self._masks(block, counts)
        digest = hashlib.sha256()
        for name, kept in masks.items():
            digest.update(name.encode() + np.packbits(kept.cpu().numpy()).tobytes())
        seen = f"{self.sample.sha256} {self.context.dampening}" if self._row.needs != "nothing" else ""
        key = key_of(digest.hexdigest(), self.repair, seen)
        self.context.made.put((block.index, key), masks)
        return key

    def pieces(self, block: Block, key: str, counts: Counts) -> Mapping[str, Piece]:
        masks = self.context.made.get((block.index, key), lambda: self._masks(block, counts))
        if self._row.gives == "nothing":  # quicker computed than kept
            return self._repaired(block, masks)
        return self.context.made.get((block.index, key, "repaired"), lambda: self._repaired(block, masks))

    def n_biases(self, counts: Counts) -> int:
        if self._row.gives != "bias":
            return 0
        return sum(x.out_features for x in self.context.anatomy.linears if counts[x.name] and x.bias is None)

    @property
    def _row(self) -> MethodRow:
        return MASK_REPAIRS[self.repair]

    @cached_property
    def _whole(self) -> ModelStatistics:
        return self.sample.statistics.whole(self.gradients)

    def _scores(self, linear: Linear, inputs: Mapping[str, InputStatistics]) -> Float[Tensor, "out in"]:
        found = self.ranking.scores(linear, inputs.get(linear.name), self._whole)
        if linear.name not in self.gone:
            return found
        least = float(found.min())
        return found.masked_fill(self.gone[linear.name], least - abs(least) - 1)

    def _masks(self, block: Block, counts: Counts) -> dict[str, Bool[Tensor, "out in"]]:
        """True = keep, of the projections that lose something."""
        inputs = self.inputs(block)
        return {
            linear.name: mask(
                self._scores(linear, inputs),
                counts[linear.name] / linear.n_weights,
                comparison=self.ranking.compares,
                group_size=self.group_size,
                name=linear.name,
            )
            for linear in block.linears
            if counts[linear.name]
        }

    def _repaired(self, block: Block, masks: Mapping[str, Bool[Tensor, "out in"]]) -> dict[str, Piece]:
        inputs, found = self.inputs(block), {}
        for linear in block.linears:
            if linear.name in masks:
                dense = Piece(linear.weight, linear.bias)
                masked = Masked(
                    linear.weight,
                    masks[linear.name],
                    inputs.get(linear.name),
                    self.context.dampening,
                    linear.name,
                )
                made = self._row.function(masked)
                added = None if made.added is None else made.added.to(linear.weight.dtype)
                found[linear.name] = dense.changed(made.weight, added)
        return found


@dataclass(frozen=True)
class LayerReconstruction(WeightPruning):
    """Weights by a reconstruction of each projection.

    Args:
        method: that updates weights.
    """

    method: Method

    @property
    def needs(self) -> Detail:
        return self.method.needs

    @property
    def gradients(self) -> tuple[Kind, ...]:
        return self.method.gradients

    def key(self, block: Block, counts: Counts) -> str:
        zeros = [counts[linear.name] for linear in block.linears]
        return key_of(self.method.record, self.sample.sha256, zeros)

    def pieces(self, block: Block, key: str, counts: Counts) -> Mapping[str, Piece]:
        return self.context.made.get((block.index, key), lambda: self._reconstructed(block, counts))

    def _reconstructed(self, block: Block, counts: Counts) -> dict[str, Piece]:
        inputs, found = self.inputs(block), {}
        whole = self.sample.statistics.whole(self.gradients) if self.gradients else None
        for linear in block.linears:
            if counts[linear.name]:
                sparsities = [counts[linear.name] / linear.n_weights]
                weight = self.method.weights(linear, inputs[linear.name], sparsities, whole)[0]
                found[linear.name] = Piece(weight, linear.bias)
        return found


@dataclass(frozen=True)
class BlockReconstruction(WeightPruning):
    """Weights by a reconstruction of a block, from its own zeros and the dense model's input to it.

    Args:
        name: a row of `BLOCK_RECONSTRUCTIONS`.
    """

    name: str

    def key(self, block: Block, counts: Counts) -> str:
        BLOCK_RECONSTRUCTIONS[self.name].check(self.context.anatomy, block, self.sample.tokens)
        assert self._states, "collected while the model is dense"
        zeros = [counts[linear.name] for linear in block.linears]
        return key_of(self.name, self.sample.sha256, self.context.dampening, zeros)

    def pieces(self, block: Block, key: str, counts: Counts) -> Mapping[str, Piece]:
        return self.context.made.get((block.index, key), lambda: self._reconstructed(block, counts))

    @cached_property
    def _states(self) -> Mapping[str, Float[Tensor, "windows length width"]]:
        """The dense model's input to each block."""
        anatomy, tokens = self.context.anatomy, self.sample.tokens
        names = [block.name for block in anatomy.blocks]
        return self.context.made.get(
            ("states", self.sample.sha256),
            lambda: dict(zip(names, stream_states(anatomy, tokens), strict=False)),
        )

    def _reconstructed(self, block: Block, counts: Counts) -> dict[str, Piece]:
        linears = {linear.name: linear for linear in block.linears}
        weights = BLOCK_RECONSTRUCTIONS[self.name].function(
            self.context.anatomy,
            block,
            self.sample.tokens,
            self._states[block.name],
            {name: counts[name] / linear.n_weights for name, linear in linears.items()},
            dampening=self.context.dampening,
        )
        return {name: Piece(weight, linears[name].bias) for name, weight in weights.items()}
