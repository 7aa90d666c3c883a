"""Evidence that importances of units are computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import OutputStatistics
from secateur.pruners.models.anatomy import Linear
from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.models.placement import Placement


@dataclass(frozen=True)
class Evidence:
    """Weights, statistics and gradients of a sub-layer of the live model.

    Args:
        layout: of the sub-layer, dense.
        inputs: of its output projection; None unless the importance needs them.
        gradients: of the dense model, by kind and the projection's full name; those that are needed.
        dampening: added to a second moment's diagonal, as a fraction of its mean, where a score inverts it.
    """

    layout: SublayerLayout
    inputs: OutputStatistics | None
    gradients: Mapping[Kind, Mapping[str, Float[Tensor, "..."]]]
    dampening: float

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Weight of the output projection, in fp32."""
        return self.layout.output.weight.float()

    @property
    def seen(self) -> OutputStatistics:
        """The statistics; never None."""
        assert self.inputs is not None, "the caller collects what the importance needs"
        return self.inputs

    def gradient(self, kind: Kind, linear: Linear) -> Float[Tensor, "..."]:
        """Gradients of one kind of a projection, on the device of its weight."""
        return self.gradients[kind][linear.name].to(linear.weight.device)

    def by_unit(self, columns: Float[Tensor, " in"]) -> Float[Tensor, "units width"]:
        """Values of the output projection's columns, a row a unit."""
        return columns.reshape(self.layout.n_units, -1)

    def unit_sums(self, lines: Callable[[Placement], Float[Tensor, " axis"]]) -> Float[Tensor, " units"]:
        """Sum over all that a unit owns of a value for each of its rows of q, k, v, gate, up and columns of o, down.

        Args:
            lines: the values along the axis of a projection on which units are.
        """
        layout = self.layout
        total = torch.zeros(layout.n_units, device=layout.output.weight.device)
        for placement in layout.placements:
            total = total + placement.per_unit(lines(placement), layout.n_units)
        return total

    def weight_sums(self, value: Callable[[Linear], Float[Tensor, "out in"]]) -> Float[Tensor, " units"]:
        """Sum of a value for each weight over all weights of the unit."""
        return self.unit_sums(lambda placement: value(placement.linear).sum(1 - placement.axis))
