"""Low-rank updates of frozen projections, and sub-layers whose projections have them while their units go."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.learned.training import lengthen, named_generator
from secateur.pruners.models.anatomy import Anatomy, Linear, Role, Sublayer
from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.structure.kprune import KeptNumbers
from secateur.pruners.structure.reorder import cut_weights

SCALE = 2.0
"""Factor of updates, the usual quotient of LoRA's alpha and rank."""

QUERIES_AND_VALUES: tuple[Role, ...] = ("q", "v", "kv", "qkv")
"""Roles of the projections that methods update where they leave out the others; fused ones as a whole."""


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
        self.linear, self._seed, self._scale = linear, seed, scale
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
    def rank(self) -> int:
        """Rank of the update."""
        return len(self.right)

    @property
    def n_values(self) -> int:
        """Numbers in both factors."""
        return self.left.numel() + self.right.numel()

    @torch.no_grad()
    def grow(self, rank: int, optimizer: torch.optim.Optimizer) -> None:
        """Raise the rank, see `lengthen`; the outputs stay as they are, as new columns of B are 0."""
        more = rank - self.rank
        generator = named_generator(self._seed, f"{self.linear.name} from {self.rank} to {rank}")
        right = first_right(more, self.linear.in_features, generator)
        lengthen(optimizer, self.left, self.left.new_zeros(len(self.left), more), 1)
        lengthen(optimizer, self.right, right.to(self.right.device), 0)

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
        """Merged weights of these units, with their gates multiplied into the output projection's.

        Args:
            kept: numbers of the units.
            gates: of all units; None: 1.

        Returns:
            Weights by full name; none without units, or without gates and updates, which leave them as they were.
        """
        if not kept or (gates is None and not self.updates):
            return {}
        weights = {x.linear.name: x.linear.weight for x in self.part.placements}
        weights |= {name: update.weight for name, update in self.updates.items()}
        if gates is not None:
            output = self.part.output.name
            weights[output] = weights[output] * gates.repeat_interleave(self.part.unit_width)
        return cut_weights(self.part, kept, weights)


class GatedSublayers:
    """All sub-layers with low-rank updates, and their gates.

    Args:
        parts: the sub-layers.
        rank: of the updates.
        seed: of their first values.
        device: of the gates.
        roles: of the projections that are updated; None: all.
    """

    def __init__(
        self,
        parts: Sequence[SublayerLayout],
        rank: int,
        seed: int,
        device: torch.device,
        *,
        roles: Collection[Role] | None = None,
    ) -> None:
        self.sublayers = [TunedSublayer(part, rank, seed, roles=roles) for part in parts]
        self.gates = {part.name: torch.ones(part.n_units, device=device) for part in parts}
        self.updates = {name: x for one in self.sublayers for name, x in one.updates.items()}

    def outputs(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Functions of the projections."""
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for one in self.sublayers:
            found |= one.outputs(self.gates[one.part.name])
        return found

    @property
    def trained(self) -> dict[str, Tensor]:
        """Factors of the updates, by name."""
        return {name: factor for one in self.sublayers for name, factor in one.trained}

    def kept(self, one: TunedSublayer) -> tuple[int, ...]:
        """Numbers of the units whose gates are not 0."""
        return tuple(self.gates[one.part.name].nonzero().flatten().tolist())

    def become(self, other: GatedSublayers) -> None:
        """Copy another's updates and gates."""
        for name, update in other.updates.items():
            self.updates[name].left.data = update.left.detach().clone()
            self.updates[name].right.data = update.right.detach().clone()
        for name, gates in other.gates.items():
            self.gates[name].copy_(gates)


def grown_ranks(
    updates: Mapping[str, LowRank], importance: Mapping[str, float], n_values: float, most: int
) -> dict[str, int]:
    """Ranks of the updates that grow: of the half of highest importance, by one factor, to so many numbers in all.

    APT (Zhao et al. 2024, arXiv 2401.12200), section 4.3 and its released code: rounded down, so the number is hardly
    ever met.

    Args:
        updates: by name.
        importance: of each.
        n_values: numbers that the factors of all may have.
        most: largest rank; updates that have it are passed over.
    """
    order = sorted(updates, key=lambda name: -importance[name])
    top = [name for name in order if updates[name].rank < most][: len(updates) // 2]
    missing = n_values - sum(update.n_values for update in updates.values())
    factor = 1 + missing / max(1, sum(updates[name].n_values for name in top))
    ranks = {name: min(most, int(updates[name].rank * factor)) for name in top}
    return {name: rank for name, rank in ranks.items() if rank > updates[name].rank}


def update_values(parts: Iterable[SublayerLayout], rank: int, roles: Collection[Role] | None = None) -> int:
    """Numbers held to tune updates of projections: factors, gradients, moments, and a merged weight's work.

    Args:
        parts: all sub-layers.
        rank: of the updates.
        roles: of the projections that are updated; None: all.
    """
    linears = [x.linear for part in parts for x in part.placements]
    largest = max((linear.n_weights for linear in linears), default=0)
    updated = [linear for linear in linears if roles is None or linear.role in roles]
    return 4 * rank * sum(sum(linear.weight.shape) for linear in updated) + 3 * largest


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
