"""Layout of the units of a block: attention, MLP and mixture of experts around the live modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Block, Linear, Sublayer
from secateur.pruners.models.mixture import Mixture
from secateur.pruners.models.placement import ALL, Placement
from secateur.spaces.architecture.candidate import Kept


@dataclass(frozen=True)
class Returns:
    """Outputs of a sub-layer's module.

    Args:
        n_outputs: length of the tuple; 0 if it is a bare tensor.
        adds: True if it adds the residual stream, the second tensor that it gets, to its output (BLOOM, MPT).
        states: True if its state, a tuple that it also gets, comes second (xLSTM).
    """

    n_outputs: int = 0
    adds: bool = False
    states: bool = False

    def nothing(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs of a removed module for these arguments: zeros, or the stream or the state that it got."""
        values = [*args, *kwargs.values()]
        tensors = [value for value in values if isinstance(value, Tensor)]
        hidden = tensors[1] if self.adds else torch.zeros_like(tensors[0])
        if not self.n_outputs:
            return hidden
        state = next((value for value in values if isinstance(value, tuple)), None) if self.states else None
        return (hidden, state, *[None] * self.n_outputs)[: self.n_outputs]


@dataclass(frozen=True)
class SublayerLayout:
    """Layout of an attention or an MLP in alike units.

    Args:
        name: for errors, e.g. ``the attention of model.layers.3``.
        kind: which of the two.
        n_units: KV groups or channels.
        placements: of every projection, the output projection last.
        vectors: of numbers for each query head, such as sinks.
        norms: norms that serve this sub-layer alone: before it, behind it, or inside.
        owner: the attention's module; None for an MLP, which some families have none for.
        returns: what its module gives, see `Returns`.
        head_dim: width of a head.
        heads_per_group: query heads of a KV group.
        rigid: True if it can only be kept or removed as a whole.
        splits: True if query heads can be cut singly, equally many of each KV group.
        further: modules without units that are removed with the last one: the projections to the states of latent
            attention, convolutions and states of a recurrent mixer, and a mixer parallel to this one.
        parallel: modules of mixers over tokens parallel to it (Falcon-H1), which are removed with its last unit, each
            with what it gives.
    """

    name: str
    kind: Sublayer
    n_units: int
    placements: tuple[Placement, ...]
    norms: tuple[nn.Module, ...]
    owner: nn.Module | None
    returns: Returns
    head_dim: int
    heads_per_group: int
    rigid: bool = False
    splits: bool = False
    further: tuple[nn.Module, ...] = ()
    parallel: tuple[tuple[nn.Module, Returns], ...] = ()
    vectors: tuple[Placement, ...] = ()

    @property
    def output(self) -> Linear:
        """The output projection, o or down."""
        return self.placements[-1].linear

    @property
    def query_params(self) -> int:
        """Parameters of one query head: its rows of q with their biases, its columns of o."""
        n_heads = self.n_units * self.heads_per_group
        biases = [0 if x.axis or x.linear.bias is None else x.queries * self.n_units for x in self.placements]
        return (self.query_weights * n_heads + sum(biases)) // n_heads + len(self.vectors)

    @property
    def query_weights(self) -> int:
        """Entries of weight matrices that belong to one query head."""
        lines = [x.linear.in_features if x.axis == 0 else x.linear.out_features for x in self.placements]
        entries = [x.queries // self.heads_per_group for x in self.placements]
        return sum(line * entry for line, entry in zip(lines, entries, strict=True))

    def leading_queries(self, queries: int) -> Int[Tensor, " columns"]:
        """Columns of the output projection, those of the first so many query heads of each unit first; 0: all."""
        columns = torch.arange(self.n_units * self.unit_width, device=self.output.weight.device)
        by_unit = columns.reshape(self.n_units, -1)
        width = int(self.unit_width * self.share_of(queries))
        return torch.cat([by_unit[:, :width].flatten(), by_unit[:, width:].flatten()])

    def of_queries(self) -> SublayerLayout:
        """The same attention with single query heads as units: those of the first group, of the second, and so on.

        Where q, k and v of a group are fused head by head, their rows are left out, and o's columns are all of a unit.
        """
        size = self.heads_per_group
        alone = (x for x in self.placements if x.queries and (len(x.parts) > 1 or x.queries == x.parts[0]))
        return replace(
            self,
            n_units=self.n_units * size,
            placements=tuple(replace(x, parts=(x.queries // size,), queries=0) for x in alone),
            heads_per_group=1,
            splits=False,
            vectors=(),
        )

    def share_of(self, queries: int) -> Fraction:
        """Share of each group's query heads; 0: all."""
        return Fraction(queries, self.heads_per_group) if queries else ALL

    @property
    def unit_width(self) -> int:
        """Columns of the output projection that belong to one unit."""
        return self.placements[-1].parts[0]

    @property
    def modules(self) -> Iterator[nn.Module]:
        """All modules that are removed with the sub-layer."""
        yield from (placement.linear.module for placement in self.placements)
        yield from dict.fromkeys(placement.linear.module for placement in self.vectors)
        yield from self.norms
        yield from self.further

    @property
    def unit_params(self) -> int:
        """Parameters of one unit."""
        biases = [x.linear.bias for x in self.placements if x.axis == 0]
        total = sum(x.linear.n_weights for x in (*self.placements, *self.vectors))
        return (total + sum(bias.numel() for bias in biases if bias is not None)) // self.n_units

    @property
    def fixed_params(self) -> int:
        """Parameters that are removed with the last unit: norms, the output projection's bias, `further` modules."""
        total = sum(p.numel() for module in self.modules for p in module.parameters(recurse=False))
        return total - self.n_units * self.unit_params


@dataclass(frozen=True)
class MixtureLayout:
    """Layout of a mixture of experts, whose units are the routed experts.

    Args:
        name: for errors, e.g. ``the experts of model.layers.3``.
        mixture: router and routed experts.
        owner: the module that is removed with the last expert: they, and shared experts.
        norms: norms that serve it alone.
        returns: what the owner gives.
        routed: of each routed expert, in channels.
        shared: of the shared experts, in channels; None if there are none, or they are no plain MLP.
        beside: modules of shared experts outside of the owner, such as an MLP beside it (GraniteMoeHybrid).
    """

    name: str
    mixture: Mixture
    owner: nn.Module
    norms: tuple[nn.Module, ...]
    returns: Returns
    routed: tuple[SublayerLayout, ...]
    shared: SublayerLayout | None = None
    beside: tuple[nn.Module, ...] = ()
    kind: Literal["experts"] = "experts"

    @property
    def n_units(self) -> int:
        return self.mixture.n_experts

    @property
    def modules(self) -> Iterator[nn.Module]:
        """All modules that are removed with it."""
        for module in (self.owner, *self.beside):
            yield from module.modules()
        yield from self.norms

    @property
    def unit_params(self) -> int:
        """Parameters of one expert, with its entries in the router."""
        return self.mixture.expert_params

    @property
    def fixed_params(self) -> int:
        """Parameters that are removed with the last expert: norms, shared experts and their gate."""
        total = sum(p.numel() for module in self.modules for p in module.parameters(recurse=False))
        return total - self.n_units * self.unit_params


@dataclass(frozen=True)
class BlockLayout:
    """Sub-layers of a block: one that mixes tokens, and an MLP or a mixture; or one of them alone (Mamba, Nemotron-H).

    Args:
        block: the block.
        attention: in KV groups; or what mixes tokens otherwise, kept or removed as a whole; None: nothing does.
        mlp: in channels, or a mixture in experts; None: neither.
        shared: modules with parameters of neither, such as norms that both read, or norms of the stream itself; removed
            with the whole block alone.
        vanishes: True if the block without its sub-layers gives what it gets.
    """

    block: Block
    attention: SublayerLayout | None
    mlp: SublayerLayout | MixtureLayout | None
    shared: tuple[nn.Module, ...] = ()
    vanishes: bool = True

    @property
    def parts(self) -> tuple[SublayerLayout | MixtureLayout, ...]:
        """Attention, and MLP or mixture; those of them that the block has."""
        return tuple(part for part in (self.attention, self.mlp) if part is not None)

    def counts(self, kept: Kept) -> tuple[tuple[int, int], ...]:
        """Units that each of `parts` keeps, and query heads of each (0: all)."""
        found = []
        if self.attention is not None:
            found.append((kept.kv_groups, kept.queries))
        if self.mlp is not None:
            found.append((kept.ffn, 0))
        return tuple(found)

    @property
    def sublayers(self) -> tuple[SublayerLayout, ...]:
        """Attention, and MLP; in place of a mixture its shared experts, where these have channels to cut."""
        mlp = self.mlp.shared if isinstance(self.mlp, MixtureLayout) else self.mlp
        return tuple(part for part in (self.attention, mlp) if part is not None)

    @property
    def shared_params(self) -> int:
        """Parameters of the shared modules."""
        return sum(p.numel() for module in self.shared for p in module.parameters(recurse=False))


def plain_mlp(name: str, linears: Sequence[Linear]) -> SublayerLayout | None:
    """Layout in channels of a plain MLP of these projections, fused or not; None if they are another thing."""
    roles = sorted(x.role for x in linears)
    if roles not in (["down", "gate", "up"], ["down", "gate_up"], ["down", "up"]):
        return None
    placements = tuple(
        Placement(x, int(x.is_output), (1, 1) if x.role == "gate_up" else (1,))  # type: ignore[arg-type]
        for x in sorted(linears, key=lambda linear: linear.is_output)
    )
    return SublayerLayout(
        name=name,
        kind="mlp",
        n_units=placements[-1].linear.in_features,
        placements=placements,
        norms=(),
        owner=None,
        returns=Returns(),
        head_dim=1,
        heads_per_group=1,
    )
