"""A model's anatomy in plain numbers: what spaces and costs are computed from, without torch objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.pruners.models.anatomy import Anatomy, Block, Role, Sublayer


@dataclass(frozen=True)
class LinearShape:
    """One prunable projection.

    Args:
        name: full path in the model.
        block: index of its block.
        sublayer: ``attention`` or ``mlp``.
        role: what it does.
        out_features: rows of its weight as ``out in``.
        in_features: columns.
    """

    name: str
    block: int
    sublayer: Sublayer
    role: Role
    out_features: int
    in_features: int

    @property
    def n_weights(self) -> int:
        """Prunable weights (no bias); also its multiply-accumulates (MACs) per token."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class BlockShape:
    """Heads and widths of one block.

    Args:
        n_heads: query heads.
        n_kv_heads: key/value heads.
        head_dim: width of a head.
        ffn_width: channels between up and down.
        window: how many tokens its attention sees at most, or None for all of them.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_width: int
    window: int | None

    def attended(self, context: int) -> int:
        """Tokens that a token at the end of `context` tokens (itself included) attends to."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class ModelShape:
    """Exact counts of a dense model.

    Args:
        family: the config's `model_type`.
        linears: the prunable projections, block by block.
        blocks: the blocks in order.
        width: of the residual stream.
        vocab_size: number of logits.
        n_params: all parameters, a tied weight counted once.
        bytes_per_param: of the prunable weights; the KV cache is held in it too.
        fixed_bytes: bytes of all parameters that are not prunable, in their own precision.
        fixed_macs: MACs per token of the linear layers outside of the blocks: the head, tied or not, and what
            else the family has there.
    """

    family: str
    linears: tuple[LinearShape, ...]
    blocks: tuple[BlockShape, ...]
    width: int
    vocab_size: int
    n_params: int
    bytes_per_param: int
    fixed_bytes: int
    fixed_macs: int

    @property
    def n_prunable(self) -> int:
        """Weights in prunable projections."""
        return sum(linear.n_weights for linear in self.linears)

    @property
    def n_fixed(self) -> int:
        """Parameters outside of the prunable projections: embedding, head, norms, biases."""
        return self.n_params - self.n_prunable

    @property
    def size_bytes(self) -> int:
        """All parameters, dense, without file headers."""
        return self.fixed_bytes + self.n_prunable * self.bytes_per_param

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one more token adds to the keys and values of all blocks, below every window."""
        return sum(2 * block.n_kv_heads * block.head_dim for block in self.blocks) * self.bytes_per_param

    def kv_bytes(self, context: int) -> int:
        """Bytes of the KV cache of one sequence of `context` tokens; sliding windows bound it."""
        values = (2 * block.n_kv_heads * block.head_dim * block.attended(context) for block in self.blocks)
        return sum(values) * self.bytes_per_param

    def macs_per_token(self, context: int) -> int:
        """Multiply-accumulates to decode one token at the end of `context` tokens (itself included).

        Counts linear layers, and in attention the scores and the weighted sum of values; not norms, softmax,
        activations, rotary embeddings.
        """
        attention = sum(2 * block.n_heads * block.head_dim * block.attended(context) for block in self.blocks)
        return self.n_prunable + self.fixed_macs + attention


def describe(anatomy: Anatomy) -> ModelShape:
    """The counts of a model as it stands (zeros count as weights)."""
    linears = tuple(
        LinearShape(x.name, x.block, x.sublayer, x.role, x.out_features, x.in_features)
        for x in anatomy.linears
    )
    prunable = {id(linear.module.weight) for linear in anatomy.linears}
    parameters = list(anatomy.model.parameters())  # each once, also if tied
    inside = set(anatomy.container.modules())
    outside = (module for module in anatomy.model.modules() if module not in inside)
    return ModelShape(
        family=anatomy.family,
        linears=linears,
        blocks=tuple(_block_shape(block, anatomy.model.config) for block in anatomy.blocks),
        width=anatomy.width,
        vocab_size=anatomy.vocab_size,
        n_params=sum(parameter.numel() for parameter in parameters),
        bytes_per_param=next(anatomy.linears).weight.element_size(),
        fixed_bytes=sum(p.numel() * p.element_size() for p in parameters if id(p) not in prunable),
        fixed_macs=sum(module.weight.numel() for module in outside if isinstance(module, nn.Linear)),
    )


def _block_shape(block: Block, config: Any) -> BlockShape:
    """Heads and widths of a block, with the window that its family's config gives to it."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[block.index] == "sliding_attention"
    window = getattr(config, "sliding_window", None) if sliding else None
    return BlockShape(block.n_heads, block.n_kv_heads, block.head_dim, block.ffn_width, window)
