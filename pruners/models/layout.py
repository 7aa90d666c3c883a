"""Layout of the units of a sub-layer in its live projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Anatomy, Block, Linear, Role, Sublayer
from secateur.pruners.models.mixture import Mixture
from secateur.spaces.architecture.candidate import Kept

ALL = Fraction(1)
"""Share of query heads."""

Form = Literal["contiguous", "interleaved"]
FORMS: tuple[Form, ...] = ("contiguous", "interleaved")
"""Order in fused projections: all q, all k, all v (GPT-2, Phi3) or q, k, v of each head (GPT-NeoX)."""


@dataclass(frozen=True)
class Placement:
    """Places of the units in one projection.

    Its axis consists of one or more parts (more where projections are fused contiguously); a part holds so many
    consecutive entries of each unit, unit by unit.

    Args:
        linear: the projection.
        axis: 0 = units are rows of the ``out in`` weight, 1 = columns.
        parts: entries of one unit in each part.
        queries: entries of a KV group's query heads, with which its entries of the first part begin; 0: none.
    """

    linear: Linear
    axis: Literal[0, 1]
    parts: tuple[int, ...]
    queries: int = 0

    def first(
        self, tensor: Shaped[Tensor, "..."], n_kept: int, n_units: int, share: Fraction = ALL
    ) -> Shaped[Tensor, "..."]:
        """The first units of a weight, or of a bias: a view if there is one part, else a copy.

        Args:
            share: of the query heads of each unit, the first of which are kept; with fewer than all it is a copy.
        """
        axis = min(self.axis, tensor.ndim - 1)
        starts = [n_units * before for before in (0, *accumulate(self.parts))]
        pieces = [
            tensor.narrow(axis, start, n_kept * size) for start, size in zip(starts, self.parts, strict=False)
        ]
        if self.queries and share != ALL:
            by_unit = pieces[0].unflatten(axis, (n_kept, self.parts[0]))
            rest = by_unit.narrow(axis + 1, self.queries, self.parts[0] - self.queries)
            queries = by_unit.narrow(axis + 1, 0, int(self.queries * share))
            pieces[0] = torch.cat([queries, rest], axis + 1).flatten(axis, axis + 1)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def size(self, n_kept: int, share: Fraction = ALL) -> int:
        """Entries of the axis that `first` keeps."""
        return n_kept * (sum(self.parts) - self.queries + int(self.queries * share))

    def index(
        self, order: Int[Tensor, " units"], heads: Int[Tensor, "units heads"] | None = None
    ) -> Int[Tensor, " axis"]:
        """Entries of the axis when the units stand in this order.

        Args:
            heads: order of the query heads of each unit, by the unit's number; None: as they are.
        """
        n_units, start = order.numel(), 0
        found: list[Tensor] = []
        for size in self.parts:
            inside = torch.arange(size, device=order.device).expand(n_units, size)
            if heads is not None and self.queries and not found:
                width = self.queries // heads.shape[1]
                turned = (heads[:, :, None] * width + torch.arange(width, device=order.device)).flatten(1)
                inside = torch.cat([turned, inside[:, self.queries :]], 1)
            found.append((start + order[:, None] * size + inside[order]).flatten())
            start += n_units * size
        return torch.cat(found)

    def per_unit(self, values: Float[Tensor, " axis"], n_units: int) -> Float[Tensor, " units"]:
        """Sum over each unit's entries; of entries behind those of units nothing."""
        split = values[: n_units * sum(self.parts)].split([n_units * size for size in self.parts])
        return torch.stack([part.reshape(n_units, -1).sum(1) for part in split]).sum(0)


@dataclass(frozen=True)
class SublayerLayout:
    """Layout of an attention or an MLP in alike units.

    Args:
        name: for errors, e.g. ``the attention of model.layers.3``.
        kind: which of the two.
        n_units: KV groups or channels.
        placements: of every projection, the output projection last.
        norms: norms that serve this sub-layer alone: before it, behind it, or inside.
        owner: the attention's module; None for an MLP, which some families have none for.
        n_outputs: length of the tuple that the attention's module returns; 0 if it is a bare tensor.
        head_dim: width of a head.
        heads_per_group: query heads of a KV group.
        rigid: True if it can only be kept or removed as a whole.
        splits: True if query heads can be cut singly, equally many of each KV group.
        further: modules without units that are removed with the last one: the projections to the states of latent
            attention, convolutions and states of a recurrent mixer, and a mixer parallel to this one.
        parallel: modules of mixers over tokens parallel to it (Falcon-H1), which are removed with its last unit, each
            with the length of the tuple that it returns.
    """

    name: str
    kind: Sublayer
    n_units: int
    placements: tuple[Placement, ...]
    norms: tuple[nn.Module, ...]
    owner: nn.Module | None
    n_outputs: int
    head_dim: int
    heads_per_group: int
    rigid: bool = False
    splits: bool = False
    further: tuple[nn.Module, ...] = ()
    parallel: tuple[tuple[nn.Module, int], ...] = ()

    @property
    def output(self) -> Linear:
        """The output projection, o or down."""
        return self.placements[-1].linear

    @property
    def query_params(self) -> int:
        """Parameters of one query head: its rows of q with their biases, its columns of o."""
        n_heads = self.n_units * self.heads_per_group
        biases = [0 if x.axis or x.linear.bias is None else x.queries * self.n_units for x in self.placements]
        return (self.query_weights * n_heads + sum(biases)) // n_heads

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
        yield from self.norms
        yield from self.further

    @property
    def unit_params(self) -> int:
        """Parameters of one unit."""
        biases = [x.linear.bias for x in self.placements if x.axis == 0]
        total = sum(x.linear.n_weights for x in self.placements)
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
        n_outputs: length of the tuple that the owner returns; 0 if it is a bare tensor.
        routed: of each routed expert, in channels.
        shared: of the shared experts, in channels; None if there are none, or they are no plain MLP.
    """

    name: str
    mixture: Mixture
    owner: nn.Module
    norms: tuple[nn.Module, ...]
    n_outputs: int
    routed: tuple[SublayerLayout, ...]
    shared: SublayerLayout | None = None
    kind: Literal["experts"] = "experts"

    @property
    def n_units(self) -> int:
        return self.mixture.n_experts

    @property
    def modules(self) -> Iterator[nn.Module]:
        """All modules that are removed with it."""
        yield from self.owner.modules()
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
    """Both sub-layers of a block.

    Args:
        block: the block.
        attention: in KV groups; or what mixes tokens otherwise, kept or removed as a whole.
        mlp: in channels, or a mixture in experts.
        shared: modules with parameters of neither, such as norms that both read; removed with the whole block alone.
    """

    block: Block
    attention: SublayerLayout
    mlp: SublayerLayout | MixtureLayout
    shared: tuple[nn.Module, ...] = ()

    @property
    def parts(self) -> tuple[SublayerLayout, SublayerLayout | MixtureLayout]:
        """Attention, and MLP or mixture."""
        return self.attention, self.mlp

    @property
    def sublayers(self) -> tuple[SublayerLayout, ...]:
        """Attention, and MLP; in place of a mixture its shared experts, where these have channels to cut."""
        mlp = self.mlp if isinstance(self.mlp, SublayerLayout) else self.mlp.shared
        return (self.attention,) if mlp is None else (self.attention, mlp)

    @property
    def shared_params(self) -> int:
        """Parameters of the shared modules."""
        return sum(p.numel() for module in self.shared for p in module.parameters(recurse=False))


def whole_placements(block: Block, kind: Sublayer, n_units: int) -> tuple[Placement, ...]:
    """Placements that share every projection out among units, of a sub-layer that is never cut to some of them."""
    mixer = block.mixer(kind)
    return tuple(
        Placement(x, int(x.is_output), ((x.in_features if x.is_output else x.out_features) // n_units,))  # type: ignore[arg-type]
        for x in (mixer.linears if mixer is not None else ())
    )


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
        n_outputs=0,
        head_dim=1,
        heads_per_group=1,
    )


def place(block: Block, kind: Sublayer, form: Form) -> tuple[Placement, ...]:
    """The placements in one sub-layer if its fused projections have this form."""
    mixer = block.mixer(kind)
    return tuple(
        Placement(
            linear,
            1 if linear.is_output else 0,
            _parts(block, linear.role, form),
            _queries(block, linear.role),
        )
        for linear in (mixer.linears if mixer is not None else ())
        if linear.role != "in"  # made for all heads
    )


def _parts(block: Block, role: Role, form: Form) -> tuple[int, ...]:
    head, queries = block.head_dim, block.head_dim * (block.n_heads // max(block.n_kv_heads, 1))
    parts: dict[Role, tuple[int, ...]] = {"o": (queries,), "k": (head,), "v": (head,), "gate_up": (1, 1)}
    parts |= {"q": (_queries(block, "q"),), "kv": (block.heads.kv_rows,), "qkv": (queries, head, head)}
    found = parts.get(role, (1,))  # of a channel
    return found if form == "contiguous" else (sum(found),)


def _queries(block: Block, role: Role) -> int:
    """Entries of a KV group's query heads in a projection, which come first."""
    width = (block.heads.query_rows or block.head_dim) if role == "q" else block.head_dim
    of_group = width * (block.n_heads // max(block.n_kv_heads, 1))
    return of_group if role in ("q", "qkv", "o") else 0


def check_parts(layouts: Sequence[BlockLayout], purpose: str) -> None:
    """Raise a ValueError unless blocks consist of one attention and one MLP, both of units that can be cut."""
    for layout in layouts:
        part, reason = layout.attention, ""
        if isinstance(layout.mlp, MixtureLayout):
            reason = layout.mlp.name
        elif part.rigid:
            reason = f"{part.name}, which has no units"
        elif part.parallel:
            reason = f"{part.name}, which a recurrent mixer is parallel to"
        if reason:
            raise ValueError(
                f"Expected blocks of one attention and one MLP, both of units that can be cut, for {purpose}, got "
                f"{reason}. Take another space, metric or repair."
            )


def check_kept(anatomy: Anatomy, blocks: Sequence[Kept]) -> None:
    """Raise a ValueError unless the model can be cut to this; the first block's attention has the caches' length."""
    if len(blocks) != len(anatomy.blocks):
        raise ValueError(
            f"Expected `blocks` for the {len(anatomy.blocks)} blocks of the model, got {len(blocks)}."
        )
    for block, kept in zip(anatomy.blocks, blocks, strict=True):
        check_block(block, kept)


def check_splits(layouts: Sequence[BlockLayout], blocks: Sequence[Kept]) -> None:
    """Raise a ValueError if query heads are to be cut singly, or KV groups, where that can't be done."""
    for layout, kept in zip(layouts, blocks, strict=True):
        if layout.attention.rigid and 0 < kept.kv_groups < layout.attention.n_units:
            raise ValueError(
                f"Expected `kv_groups` 0 or {layout.attention.n_units} at {layout.block.name}, in which what mixes "
                f"tokens is kept or removed as a whole, got {kept.kv_groups}."
            )
        if kept.queries and not layout.attention.splits:
            raise ValueError(
                f"Expected query heads that can be cut singly for `queries`, got {kept.queries} at "
                f"{layout.block.name}, whose heads can't. Cut KV groups."
            )


def check_block(block: Block, kept: Kept) -> None:
    """Raise a ValueError unless the block can be cut to this."""
    fewest = 1 if block.index == 0 else 0
    if not fewest <= kept.kv_groups <= block.attention_units:
        raise ValueError(
            f"Expected `kv_groups` from {fewest} to {block.attention_units}, got {kept.kv_groups} at {block.name}."
        )
    most = block.n_heads // block.attention_units - 1 if block.attention_units else 0
    if kept.queries and not (kept.kv_groups and 0 < kept.queries <= most):
        raise ValueError(
            f"Expected `queries` from 1 to {most} beside KV groups, or none, got {kept.queries} beside "
            f"{kept.kv_groups} at {block.name}."
        )
    if block.mixture is not None:
        block.mixture.check(kept.ffn)
        _check_channels(block, block.mixture, kept)
    elif kept.channels or kept.shared:
        raise ValueError(
            f"Expected `channels` and `shared` in blocks with a mixture of experts, got {kept.channels} and "
            f"{kept.shared} at {block.name} without. Use `ffn`."
        )
    elif not 0 <= kept.ffn <= block.ffn_width:
        raise ValueError(f"Expected `ffn` from 0 to {block.ffn_width}, got {kept.ffn} at {block.name}.")


def _check_channels(block: Block, mixture: Mixture, kept: Kept) -> None:
    shared = [x for x in block.linears if x.sublayer == "experts" and x.expert is None and x.is_output]
    widest = {"channels": mixture.n_channels, "shared": shared[0].in_features if len(shared) == 1 else 0}
    for name, n_units in widest.items():
        n_kept = getattr(kept, name)
        if n_kept and not (kept.ffn and 0 < n_kept <= n_units):
            raise ValueError(
                f"Expected `{name}` from 1 to {n_units} beside experts, or 0, got {n_kept} beside {kept.ffn} at "
                f"{block.name}."
            )
