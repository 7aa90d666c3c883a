"""Recipes that leave zeros by a method that gives all weights of a block at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.stream import stream_states
from secateur.pruners.models.anatomy import Block
from secateur.pruners.models.cutting import Piece
from secateur.pruners.recipes.plan import key_of
from secateur.pruners.recipes.weight_pruning import Counts, Zeroing
from secateur.spaces.methods import BLOCK_RECONSTRUCTIONS


@dataclass(frozen=True)
class Together(Zeroing):
    """The weights of a block depend on its own zeros and on what the dense model gives to it.

    Args:
        name: a row of `BLOCK_RECONSTRUCTIONS`.
    """

    name: str

    @property
    def needs(self) -> Literal["nothing"]:
        return "nothing"

    @property
    def gradients(self) -> tuple[Kind, ...]:
        return ()

    def key(self, block: Block, counts: Counts) -> str:
        BLOCK_RECONSTRUCTIONS[self.name].check(self.basis.anatomy, block, self.sample.tokens)
        assert self._states, "looked at while the model is dense"
        zeros = [counts[linear.name] for linear in block.linears]
        return key_of(self.name, self.sample.sha256, self.basis.damp, zeros)

    def pieces(self, block: Block, key: str, counts: Counts) -> Mapping[str, Piece]:
        return self.basis.made.get((block.index, key), lambda: self._rebuilt(block, counts))

    @cached_property
    def _states(self) -> Mapping[str, Float[Tensor, "windows length width"]]:
        """What the dense model gives to each block."""
        anatomy, tokens = self.basis.anatomy, self.sample.tokens
        names = [block.name for block in anatomy.blocks]
        return self.basis.made.get(
            ("states", self.sample.sha256),
            lambda: dict(zip(names, stream_states(anatomy, tokens), strict=False)),
        )

    def _rebuilt(self, block: Block, counts: Counts) -> dict[str, Piece]:
        linears = {linear.name: linear for linear in block.linears}
        weights = BLOCK_RECONSTRUCTIONS[self.name].function(
            self.basis.anatomy,
            block,
            self.sample.tokens,
            self._states[block.name],
            {name: counts[name] / linear.n_weights for name, linear in linears.items()},
            damp=self.basis.damp,
        )
        return {name: Piece(weight, linears[name].bias) for name, weight in weights.items()}
