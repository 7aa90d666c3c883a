"""Low-rank updates of frozen projections, and sub-layers whose projections have them while their units go."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.learned.training import named_generator
from secateur.pruners.models.anatomy import Anatomy, Linear, Role, Sublayer
from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.structure.kprune import KeptNumbers
from secateur.pruners.structure.reorder import cut_weights

SCALE = 2.0
"""Factor of updates, the usual quotient of LoRA's alpha and rank."""


def first_right(rank: int, n_in: int, generator: torch.Generator) -> Float[Tensor, "rank in"]:
    """First values of LoRA's A: uniform within one over the square root of the inputs."""
    return (2 * torch.rand(rank, n_in, generator=generator) - 1) / math.sqrt(n_in)


class LowRank:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) of a frozen projection: ``W + scale B A``, at first W.

    Args:
        linear: the projection, in float32.
        rank: of the update.
        seed: of the first values, which depend on the projection's name, too.
        scale: of the update.
    """

    def __init__(self, linear: Linear, rank: int, seed: int, scale: float = SCALE) -> None:
        self.linear, self._scale = linear, scale
        device = linear.weight.device
        right = first_right(rank, linear.in_features, named_generator(seed, linear.name))
        self.left = torch.zeros(linear.out_features, rank, device=device, requires_grad=True)
        self.right = right.to(device).requires_grad_()

    def outputs(
        self, x: Float[Tensor, "*tokens in"], factors: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*tokens out"]:
        """Outputs of the updated projection; no gradient of a matrix of its size is formed.

        Args:
            factors: of the rows of the frozen weight and of its bias; None: 1.
        """
        frozen = F.linear(x, self.linear.weight, self.linear.bias)
        update = F.linear(F.linear(x, self.right), self.left)
        return (frozen if factors is None else frozen * factors) + self._scale * update

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The merged weight."""
        return self.linear.weight + self._scale * (self.left.detach() @ self.right.detach())

    @property
    def gradient(self) -> Float[Tensor, "out in"]:
        """Gradient of the merged weight as the factors alone tell it: ``dB A + B dA - dB dA``.

        LoRAPrune (Zhang et al. 2024, arXiv 2305.18403): the change of ``B A`` in a step of gradient descent of size 1.
        """
        left, right = self.left.grad, self.right.grad
        assert left is not None, "after a backward pass"
        assert right is not None, "likewise"
        return left @ (self.right.detach() - right) + self.left.detach() @ right


class TunedSublayer:
    """A sub-layer with low-rank updates of its projections and a gate for each unit.

    Args:
        part: the sub-layer.
        rank: of the updates.
        seed: of their first values.
        scale: of the updates.
        roles: of the projections that are updated; None: all.
    """

    def __init__(
        self,
        part: SublayerLayout,
        rank: int,
        seed: int,
        *,
        scale: float = SCALE,
        roles: Collection[Role] | None = None,
    ) -> None:
        self.part = part
        linears = [x.linear for x in part.placements if roles is None or x.linear.role in roles]
        self.updates = {linear.name: LowRank(linear, rank, seed, scale) for linear in linears}

    @property
    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Factors of the updates, by name."""
        for name, update in self.updates.items():
            yield f"left {name}", update.left
            yield f"right {name}", update.right

    def outputs(self, gates: Float[Tensor, " units"]) -> dict[str, Callable[[Tensor], Tensor]]:
        """Functions of the projections with these gates on the units: on the columns of the output projection."""
        columns = gates.repeat_interleave(self.part.unit_width)
        found = {name: update.outputs for name, update in self.updates.items()}
        inside = found.get(self.part.output.name, self._frozen)
        return found | {self.part.output.name: lambda x: inside(x * columns)}

    def _frozen(self, x: Tensor) -> Tensor:
        return F.linear(x, self.part.output.weight, self.part.output.bias)

    def cut(self, kept: tuple[int, ...], gates: Float[Tensor, " units"] | None = None) -> dict[str, Tensor]:
        """Merged weights of these units, with their gates multiplied into the output projection's."""
        weights = {x.linear.name: x.linear.weight for x in self.part.placements}
        weights |= {name: update.weight for name, update in self.updates.items()}
        if gates is not None:
            output = self.part.output.name
            weights[output] = weights[output] * gates.repeat_interleave(self.part.unit_width)
        return cut_weights(self.part, kept, weights)


def update_values(parts: Iterable[SublayerLayout], rank: int) -> int:
    """Numbers held to tune updates of all projections: factors, gradients, moments, and a merged weight's work."""
    linears = [x.linear for part in parts for x in part.placements]
    largest = max((linear.n_weights for linear in linears), default=0)
    return 4 * rank * sum(sum(linear.weight.shape) for linear in linears) + 3 * largest


def cut_sublayers(
    anatomy: Anatomy, found: Iterable[tuple[TunedSublayer, tuple[int, ...], Mapping[str, Tensor]]]
) -> tuple[tuple[KeptNumbers, ...], dict[str, Float[Tensor, "out _"]]]:
    """Kept units of each block, and their weights by full name, in the model's dtypes.

    Args:
        anatomy: the dense model, in its own dtypes.
        found: each sub-layer, its kept units, and its weights.
    """
    numbers: list[dict[Sublayer, tuple[int, ...]]] = [{} for _ in anatomy.blocks]
    dtypes = {linear.name: linear.weight.dtype for linear in anatomy.linears}
    weights: dict[str, Tensor] = {}
    for one, kept, of_projections in found:
        numbers[one.part.output.block][one.part.kind] = kept
        weights |= {name: weight.to(dtypes[name]) for name, weight in of_projections.items()}
    return tuple(numbers), weights
