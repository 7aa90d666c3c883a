"""A live model with gates on its units, blocks and hidden channels, and trained weights behind them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.learned.gates import Gates
from secateur.pruners.learned.masked_weights import replaced_weights
from secateur.pruners.learned.target_shape import TargetShape
from secateur.pruners.models.anatomy import Anatomy, Linear, Sublayer
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.models.narrow import LiveStream, Narrow
from secateur.pruners.structure.chosen import ChosenUnits
from secateur.pruners.structure.reorder import cut_weights

BLOCKS, HIDDEN = "blocks", "hidden"
"""Names of the gates of whole blocks and of hidden channels; others have their sub-layer's."""

Values = Mapping[str, Float[Tensor, " units"]]
"""Values of gates by the names of what has the units."""


@dataclass
class GatedSublayer:
    """A sub-layer with trained weights, and gates of its units if some of them are to go."""

    part: SublayerLayout
    gates: Gates | None
    weights: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = {x.name: x.weight.detach().float().clone().requires_grad_() for x in self.linears}

    @property
    def linears(self) -> list[Linear]:
        return [placement.linear for placement in self.part.placements]

    @property
    def kept(self) -> tuple[int, ...]:
        """Units that stay."""
        return tuple(range(self.part.n_units)) if self.gates is None else self.gates.kept

    def gated(
        self, units: Float[Tensor, " units"] | None, rows: Float[Tensor, " width"] | None
    ) -> Float[Tensor, "out in"]:
        """Weight of the output projection with gates of its units and factors of its rows; None: all 1."""
        weight = self.weights[self.part.output.name]
        if units is not None:
            weight = weight * units.repeat_interleave(self.part.unit_width)
        return weight if rows is None else weight * rows[:, None]

    def cut(self, rows: Float[Tensor, " width"] | None) -> dict[str, Tensor]:
        """Trained weights of the units that stay, with their gates and these factors of the output's rows."""
        output = self.gated(None if self.gates is None else self.gates.final, rows)
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        return cut_weights(self.part, self.kept, weights | {self.part.output.name: output.detach()})


class GatedModel:
    """Gates of a model for a target shape, and the weights that are trained with them.

    The gates of units are on the columns of the output projections, those of blocks on what these add to the residual
    stream, those of hidden channels on that, on the first block's inputs, and on the outputs of norms, which are over
    the channels whose gate is not 0. The first block has no gate: caches read their length from it.

    Args:
        anatomy: the dense model, in fp32.
        layouts: of its blocks.
        shape: that is to be left.
        seed: of the first locations.
    """

    def __init__(
        self, anatomy: Anatomy, layouts: Sequence[BlockLayout], shape: TargetShape, seed: int
    ) -> None:
        device = anatomy.embedding.weight.device
        self._anatomy, self._layouts = anatomy, layouts
        self._parts = [
            GatedSublayer(
                part,
                Gates(part.name, part.n_units, n_kept, seed, part.output.weight.device)
                if n_kept < part.n_units
                else None,
            )
            for part in trained_parts(layouts, shape)
            for n_kept in [shape.units[part.name]]
        ]
        self.gates = {one.part.name: one.gates for one in self._parts if one.gates is not None}
        n_further = len(layouts) - 1
        if shape.n_blocks < len(layouts):
            self.gates[BLOCKS] = Gates(BLOCKS, n_further, shape.n_blocks - 1, seed, device)
        if shape.width:
            self.gates[HIDDEN] = Gates(HIDDEN, anatomy.width, shape.width, seed, device)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Trained weights by the projections' full names."""
        return {name: weight for one in self._parts for name, weight in one.weights.items()}

    def sampled(self, generator: torch.Generator) -> Values:
        """Gates of a step."""
        return {name: gates.sampled(generator) for name, gates in self.gates.items()}

    @property
    def present(self) -> Values:
        """Gates of the model as it is now, to measure it."""
        return {name: gates.present for name, gates in self.gates.items()}

    @contextmanager
    def computing(self, values: Values) -> Iterator[None]:
        """Context in which the live model computes with the trained weights and these gates."""
        functions: dict[str, Callable[[], Tensor]] = {}
        for one in self._parts:
            for name in one.weights:
                functions[name] = self._weight(one, name, values)
        linears = [linear for one in self._parts for linear in one.linears]
        with ExitStack() as stack:
            stack.enter_context(replaced_weights(linears, functions))
            if HIDDEN in values:
                stream = LiveStream(self._anatomy)
                stack.callback(stream.restore)
                self._narrow(stream, values[HIDDEN])
            yield

    def _weight(self, one: GatedSublayer, name: str, values: Values) -> Callable[[], Tensor]:
        if name != one.part.output.name:
            return lambda: one.weights[name]
        return lambda: one.gated(values.get(one.part.name), self._rows(one.part.output.block, values))

    def _rows(self, block: int, values: Values) -> Float[Tensor, " width"] | None:
        """Factors of the rows of a block's output projections; None: all 1."""
        rows = values.get(HIDDEN)
        if BLOCKS not in values or block == 0:
            return rows
        of_block = values[BLOCKS][block - 1]
        return of_block.expand(self._anatomy.width) if rows is None else rows * of_block

    def _narrow(self, stream: LiveStream, hidden: Float[Tensor, " width"]) -> None:
        channels = hidden.detach().nonzero().flatten()
        narrow = Narrow(tuple(channels.tolist()), {}, hidden[channels])
        for block in range(len(self._layouts) + 1):
            stream.narrow_block(block, narrow)

    def chosen(self) -> ChosenUnits:
        """Units, blocks and channels that stay at the end, and their weights; the live model is left dense."""
        stays = {0, *(block + 1 for block in self._kept(BLOCKS, len(self._layouts) - 1))}
        final = {name: gates.final for name, gates in self.gates.items()}
        parts = {one.part.name: one for one in self._parts}
        weights: dict[str, Tensor] = {}
        numbers: list[dict[Sublayer, tuple[int, ...]]] = [{} for _ in self._layouts]
        for part in (part for layout in self._layouts for part in layout.sublayers):
            block, one = part.output.block, parts.get(part.name)
            kept = tuple(range(part.n_units)) if one is None else one.kept
            numbers[block][part.kind] = kept if block in stays else ()
            if one is not None and numbers[block][part.kind]:
                weights |= one.cut(self._rows(block, final))
        narrow = None
        if HIDDEN in self.gates:
            channels = self.gates[HIDDEN].kept
            narrow = Narrow(channels, {}, final[HIDDEN][list(channels)])
        return ChosenUnits(tuple(numbers), weights, narrow)

    def _kept(self, name: str, n_units: int) -> Collection[int]:
        return self.gates[name].kept if name in self.gates else range(n_units)


def trained_parts(layouts: Sequence[BlockLayout], shape: TargetShape) -> list[SublayerLayout]:
    """Sub-layers whose weights are trained: those that lose something."""
    everywhere = shape.width or shape.n_blocks < len(layouts)
    parts = [part for layout in layouts for part in layout.sublayers]
    return [part for part in parts if everywhere or shape.units[part.name] < part.n_units]
