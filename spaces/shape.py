"""The dense model in a few numbers: what exact costs of candidates are counted from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from secateur.spaces.latency import LatencyTable


@dataclass(frozen=True)
class BlockShape:
    """What the parts of one dense block weigh.

    A KV group is a KV head with the query heads that read it; a channel is one of those between up and down.

    Args:
        n_kv_groups: how many groups its attention has, > 0.
        group_params: parameters of one group: its rows of q, k, v with their biases, its columns of o.
        attention_params: what else goes with the attention as a whole: its norms, o's bias, q's and k's norms.
        ffn_width: how many channels its MLP has, > 0.
        channel_params: parameters of one channel: its rows of up (and gate) with their biases, its column of down.
        mlp_params: what else goes with the MLP as a whole: its norms, down's bias.
        group_macs: multiply-accumulates of one group for one token at the context of one window, scores and
            weighted sum included.
        channel_macs: multiply-accumulates of one channel for one token.
        group_kv_bytes: bytes that one token adds to one group's keys and values, as stored.
        attention_bias: parameters that the attention's output gains where a repair gives it a bias; 0: it has one.
        mlp_bias: likewise.

    Raises:
        ValueError: if a part is empty or a number negative.
    """

    n_kv_groups: int
    group_params: int
    attention_params: int
    ffn_width: int
    channel_params: int
    mlp_params: int
    group_macs: int
    channel_macs: int
    group_kv_bytes: int
    attention_bias: int = 0
    mlp_bias: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in {"attention_params", "mlp_params", "attention_bias", "mlp_bias"} else 1
            if value < least:
                raise ValueError(f"Expected `{name}` >= {least}, got {value}.")

    def params(self, kv_groups: int, ffn: int) -> int:
        """Parameters of the block with so many groups and channels; 0 of them: the sub-layer is removed whole."""
        attention = kv_groups * self.group_params + (self.attention_params if kv_groups else 0)
        return attention + ffn * self.channel_params + (self.mlp_params if ffn else 0)

    def bias_params(self, kv_groups: int, ffn: int) -> int:
        """Parameters of the biases that a repair adds: sub-layers that are whole, or gone, need none."""
        attention = self.attention_bias if 0 < kv_groups < self.n_kv_groups else 0
        return attention + (self.mlp_bias if 0 < ffn < self.ffn_width else 0)

    def macs(self, kv_groups: int, ffn: int) -> int:
        """Multiply-accumulates a token of the block with so many groups and channels."""
        return kv_groups * self.group_macs + ffn * self.channel_macs

    def kv_bytes(self, kv_groups: int) -> int:
        """Bytes a token of its keys and values, as stored."""
        return kv_groups * self.group_kv_bytes


@dataclass(frozen=True)
class ModelShape:
    """Size of the dense model.

    Args:
        n_params: parameters of the whole model, embedding, norms and head included, shared ones once.
        bytes_per_param: as stored, e.g. 2 for bfloat16.
        macs_per_token: multiply-accumulates to compute one token.
        kv_bytes_per_token: bytes that one token adds to the KV cache.
        blocks: what its blocks are made of; empty where that was not counted.
        latency: how long their parts take on the target device; None where that was not measured.
        held_groups: numbers of KV groups that the form in which models are saved can hold, if all blocks are alike;
            None: all.
    """

    n_params: int
    bytes_per_param: float
    macs_per_token: int
    kv_bytes_per_token: int
    blocks: tuple[BlockShape, ...] = ()
    latency: LatencyTable | None = None
    held_groups: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        plain = {
            "blocks": [asdict(block) for block in self.blocks],
            "latency": None if self.latency is None else self.latency.to_json(),
        }
        return {f.name: getattr(self, f.name) for f in fields(self)} | plain

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ModelShape:
        """Inverse of `to_json`; also reads shapes from before there were blocks."""
        latency, held_groups = raw.get("latency"), raw.get("held_groups")
        parts = {
            "blocks": tuple(BlockShape(**block) for block in raw.get("blocks", ())),
            "latency": None if latency is None else LatencyTable.from_json(latency),
            "held_groups": None if held_groups is None else tuple(held_groups),
        }
        return cls(**{**raw, **parts})

    def with_zeros(self, n_zeros: int, n_weights: int) -> dict[str, float]:
        """Costs of the model with zeros among its prunable weights.

        Zeros are stored, and multiplied by, like other weights.

        Args:
            n_zeros: how many.
            n_weights: how many weights are prunable.
        """
        return {
            "sparsity": n_zeros / n_weights,
            "params": self.n_params - n_zeros,
            "size_bytes": self.n_params * self.bytes_per_param,
            "macs": self.macs_per_token,
            "kv_bytes": self.kv_bytes_per_token,
        }
