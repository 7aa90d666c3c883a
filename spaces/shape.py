"""Shape of the dense model: sizes for exact costs, and prunable linears grouped into units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from secateur.spaces.latency import LatencyTable

_MAY_BE_NONE = {
    "attention_params",
    "mlp_params",
    "attention_bias",
    "mlp_bias",
    "shared_params",
    "query_params",
    "query_macs",
    "attention_macs",
    "group_kv_bytes",
}


@dataclass(frozen=True)
class ExpertShape:
    """Routing of a mixture of experts, whose experts take the place of channels in a block's shape.

    Args:
        top_k: experts that a token is routed to.
        fewest: least number of experts that can stay.
        multiple: divisor of every number of experts that stay.
        router_macs: multiply-accumulates a token of one expert's row of the router.
        shared_macs: those of shared experts.
        channels: of one routed expert; 0: they are not counted.
        channel_params: parameters of one of them.
        channel_macs: multiply-accumulates of one of them for one token.
        shared: channels of the shared experts that can be cut; 0: none.
        shared_params: parameters of one of them.
        shared_channel_macs: multiply-accumulates of one of them for one token.
        shared_bias: parameters of a bias that a repair adds to their output; 0: it has one already.
    """

    top_k: int
    fewest: int = 1
    multiple: int = 1
    router_macs: int = 0
    shared_macs: int = 0
    channels: int = 0
    channel_params: int = 0
    channel_macs: int = 0
    shared: int = 0
    shared_params: int = 0
    shared_channel_macs: int = 0
    shared_bias: int = 0

    def macs(self, n_experts: int, expert_macs: int, channels: int = 0, shared: int = 0) -> int:
        """Multiply-accumulates a token of a mixture with so many experts; 0: none. Of channels 0 is all."""
        if not n_experts:
            return 0
        of_expert = expert_macs - (self.channels - channels) * self.channel_macs if channels else expert_macs
        of_shared = self.shared_macs - ((self.shared - shared) * self.shared_channel_macs if shared else 0)
        return min(n_experts, self.top_k) * of_expert + n_experts * self.router_macs + of_shared

    def fewer_params(self, n_experts: int, channels: int, shared: int) -> int:
        """Parameters that so many experts lack with so many channels each, and in the shared ones; 0: all."""
        routed = n_experts * (self.channels - channels) * self.channel_params if channels else 0
        return routed + ((self.shared - shared) * self.shared_params if shared else 0)


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one dense block's parts.

    A KV group is a KV head with the query heads that read it; a channel is one of those between up and down.

    Args:
        n_kv_groups: number of its KV groups; 0 of a block in which nothing mixes tokens.
        group_params: parameters of one group: its rows of q, k, v with their biases, its columns of o.
        attention_params: further parameters of the attention: its norms, o's bias, q's and k's norms.
        ffn_width: number of channels of its MLP; 0 of a block without.
        channel_params: parameters of one channel: its rows of up (and gate) with their biases, its column of down.
        mlp_params: further parameters of the MLP: its norms, down's bias.
        group_macs: multiply-accumulates of one group for one token at the context of one window, scores and
            weighted sum included.
        channel_macs: multiply-accumulates of one channel for one token.
        group_kv_bytes: bytes that one token adds to one group's keys and values, as stored; 0 of a recurrent mixer.
        attention_bias: parameters of a bias that a repair adds to the attention's output; 0: it has one already.
        mlp_bias: likewise.
        shared_params: parameters of neither attention nor MLP, such as norms that both read, which go with the last of
            them.
        attention_macs: further multiply-accumulates of the attention for one token: of projections without units, and
            of a recurrent mixer parallel to it.
        rigid: True if its attention, or recurrent mixer, is kept or removed as a whole, or there is none.
        rigid_ffn: likewise its MLP.
        n_queries: query heads of a KV group that can be cut singly, equally many in each group; 1: they can't.
        query_params: parameters of one query head, of those of its group.
        query_macs: multiply-accumulates of one query head, likewise.
        experts: of a block with a mixture, whose routed experts then take the place of channels.

    Raises:
        ValueError: if a number is negative, or a sub-layer that is there without size.
    """

    n_kv_groups: int = 0
    group_params: int = 0
    attention_params: int = 0
    ffn_width: int = 0
    channel_params: int = 0
    mlp_params: int = 0
    group_macs: int = 0
    channel_macs: int = 0
    group_kv_bytes: int = 0
    attention_bias: int = 0
    mlp_bias: int = 0
    shared_params: int = 0
    attention_macs: int = 0
    rigid: bool = False
    rigid_ffn: bool = False
    n_queries: int = 1
    query_params: int = 0
    query_macs: int = 0
    experts: ExpertShape | None = None

    def __post_init__(self) -> None:
        absent = set[str]()
        if not self.n_kv_groups:
            absent |= {"n_kv_groups", "group_params", "group_macs"}
        if not self.ffn_width:
            absent |= {"ffn_width", "channel_params", "channel_macs"}
        for name, value in vars(self).items():
            least = 0 if name in _MAY_BE_NONE | absent else 1
            if type(value) is int and value < least:
                raise ValueError(f"Expected `{name}` >= {least}, got {value}.")
        if not self.n_kv_groups and not self.ffn_width:
            raise ValueError("Expected `n_kv_groups` or `ffn_width` >= 1, got 0 of both.")

    def params(self, kv_groups: int, ffn: int, queries: int = 0, channels: int = 0, shared: int = 0) -> int:
        """Parameters of the block with these numbers of groups and channels; 0: without the sub-layer.

        Args:
            queries: query heads of each group; 0: all.
            channels: of each routed expert; 0: all.
            shared: channels of shared experts; 0: all.
        """
        group = self.group_params - self._fewer(queries) * self.query_params
        attention = kv_groups * group + (self.attention_params if kv_groups else 0)
        norms = self.shared_params if kv_groups or ffn else 0
        whole = attention + ffn * self.channel_params + (self.mlp_params if ffn else 0) + norms
        return whole - (self.experts.fewer_params(ffn, channels, shared) if self.experts else 0)

    def _fewer(self, queries: int) -> int:
        """Query heads that each group is without."""
        return self.n_queries - queries if queries else 0

    def bias_params(
        self, kv_groups: int, ffn: int, queries: int = 0, channels: int = 0, shared: int = 0
    ) -> int:
        """Parameters of the biases added by a repair; dense and removed sub-layers get none, nor do routed experts."""
        is_cut = 0 < kv_groups < self.n_kv_groups or (kv_groups and self._fewer(queries))
        attention = self.attention_bias if is_cut else 0
        is_less = 0 < shared < self.experts.shared if self.experts else False
        of_shared = self.experts.shared_bias if self.experts and is_less else 0
        return attention + of_shared + (self.mlp_bias if 0 < ffn < self.ffn_width else 0)

    def macs(self, kv_groups: int, ffn: int, queries: int = 0, channels: int = 0, shared: int = 0) -> int:
        """Multiply-accumulates a token of the block with these numbers of groups and channels."""
        mlp = (
            ffn * self.channel_macs
            if self.experts is None
            else self.experts.macs(ffn, self.channel_macs, channels, shared)
        )
        fixed = self.attention_macs if kv_groups else 0
        return kv_groups * (self.group_macs - self._fewer(queries) * self.query_macs) + fixed + mlp

    @property
    def query_share(self) -> float:
        """Share of a group's parameters that one query head is."""
        return self.query_params / self.group_params

    def kv_bytes(self, kv_groups: int) -> int:
        """Bytes a token of its keys and values, as stored."""
        return kv_groups * self.group_kv_bytes


@dataclass(frozen=True)
class NarrowShape:
    """Sizes of the model with fewer hidden channels, all units kept.

    Args:
        width: hidden channels, those of the residual stream.
        n_params: parameters of the whole model.
        macs_per_token: multiply-accumulates to compute one token.
        blocks: shapes of its blocks.
        held: pairs of KV groups and query heads of each (0: all) that a stock class holds at this width.
    """

    width: int
    n_params: int
    macs_per_token: int
    blocks: tuple[BlockShape, ...]
    held: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """Size of the dense model.

    Args:
        n_params: parameters of the whole model, embedding, norms and head included, shared ones once.
        bytes_per_param: as stored, e.g. 2 for bfloat16.
        macs_per_token: multiply-accumulates to compute one token.
        kv_bytes_per_token: bytes that one token adds to the KV cache.
        blocks: shapes of its blocks; empty if unknown.
        latency: measured times of their parts on the target device, or None.
        held_groups: numbers of KV groups that the form in which models are saved can hold, if all blocks are alike;
            None: all.
        held_queries: likewise pairs of KV groups and query heads of each, where these are cut.
        narrower: the model with fewer hidden channels, widths descending; empty where these are never cut.
    """

    n_params: int
    bytes_per_param: float
    macs_per_token: int
    kv_bytes_per_token: int
    blocks: tuple[BlockShape, ...] = ()
    latency: LatencyTable | None = None
    held_groups: tuple[int, ...] | None = None
    held_queries: tuple[tuple[int, int], ...] | None = None
    narrower: tuple[NarrowShape, ...] = ()

    def at(self, hidden: int) -> ModelShape:
        """The shape with so many hidden channels; 0: all of them."""
        found = next((x for x in self.narrower if x.width == hidden), None)
        if hidden and found is None:
            widths = ", ".join(str(x.width) for x in self.narrower) or "none"
            raise ValueError(f"Expected one of the hidden widths {widths}, got {hidden}.")
        if found is None:
            return self
        return replace(
            self, n_params=found.n_params, macs_per_token=found.macs_per_token, blocks=found.blocks
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def with_zeros(self, n_zeros: int, n_weights: int) -> dict[str, float]:
        """Costs of the model with zeros among its prunable weights.

        Zeros are stored, and multiplied by, like other weights.
        """
        return {
            "sparsity": n_zeros / n_weights,
            "params": self.n_params - n_zeros,
            "size_bytes": self.n_params * self.bytes_per_param,
            "macs": self.macs_per_token,
            "kv_bytes": self.kv_bytes_per_token,
        }


Granularity = Literal["linear", "sublayer", "block"]


@dataclass(frozen=True)
class Prunable:
    """One linear of a block, as plain data.

    Args:
        name: its full path in the model.
        block: index of its block, from 0.
        sublayer: e.g. ``attention`` or ``mlp``.
        n_weights: number of its weights, > 0.
    """

    name: str
    block: int
    sublayer: str
    n_weights: int

    def __post_init__(self) -> None:
        if self.n_weights <= 0:
            raise ValueError(f"Expected `n_weights` > 0, got {self.n_weights} at {self.name}.")


@dataclass(frozen=True)
class Unit:
    """Linears with a common level: one slot of a space.

    Args:
        name: unique in the space.
        sizes: number of weights of each member.
        block: index of the block it is in.
        members: full names of the linears, one a size.
    """

    name: str
    sizes: tuple[int, ...]
    block: int
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.members or len(self.members) != len(self.sizes):
            raise ValueError(
                f"Expected a size for each of the members, got {len(self.sizes)} sizes and "
                f"{len(self.members)} members at {self.name}."
            )


def group(linears: Sequence[Prunable], granularity: Granularity) -> tuple[Unit, ...]:
    """Units of the linears, in the order of their first members."""
    members: dict[str, list[Prunable]] = {}
    for linear in linears:
        block = f"block{linear.block}"
        names = {"linear": linear.name, "sublayer": f"{block}.{linear.sublayer}", "block": block}
        members.setdefault(names[granularity], []).append(linear)
    return tuple(
        Unit(name, tuple(m.n_weights for m in group), group[0].block, tuple(m.name for m in group))
        for name, group in members.items()
    )


def role_of(name: str) -> str:
    """Role of a linear in its block, such as ``q_proj``: the last part of its full name."""
    return name.rpartition(".")[2]


Row = TypeVar("Row")


def by_depth(rows: Sequence[Row], n_blocks: int) -> list[Row]:
    """One row for each block of a model: that of the block at the same relative depth of the model that rows are of.

    Block i of n takes the row of block ``floor((i + 1/2) m / n)`` of m; the same number of blocks takes each its own.
    """
    return [rows[(2 * i + 1) * len(rows) // (2 * n_blocks)] for i in range(n_blocks)]


def split_protected(
    linears: Sequence[Prunable], patterns: Sequence[str]
) -> tuple[tuple[Prunable, ...], tuple[Prunable, ...]]:
    """Linears to prune, and protected ones, whose full name matches a pattern (as in `fnmatch`).

    Raises:
        ValueError: if a pattern matches no linear, or nothing is left to prune.
    """
    for pattern in patterns:
        if not any(fnmatchcase(linear.name, pattern) for linear in linears):
            raise ValueError(
                f"Expected each pattern in `protect` to match a linear, got {pattern!r}, which matches none. "
                f"Linears are named as in {linears[0].name!r}."
            )
    protected = tuple(x for x in linears if any(fnmatchcase(x.name, pattern) for pattern in patterns))
    free = tuple(x for x in linears if x not in protected)
    if not free:
        raise ValueError(
            f"Expected `protect` to leave linears to prune, got {list(patterns)}, which match all "
            f"{len(linears)}. Give narrower patterns."
        )
    return free, protected
