"""Parts of a causal LM, as found by structure, around the live modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from secateur.spaces.architecture.candidate import Kept

Sublayer = Literal["attention", "mlp"]
Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]


@dataclass(frozen=True)
class Linear:
    """One prunable projection of a block.

    Args:
        name: its full path in the model, e.g. ``model.layers.3.self_attn.q_proj``.
        module: the live module, an ``nn.Linear`` or a Conv1D (weight stored transposed).
        role: its function in the block; ``qkv`` and ``gate_up`` are fused projections.
        sublayer: ``attention`` or ``mlp``.
        block: index of its block.
        transposed: True if the module stores its weight as ``in out`` (GPT-2's Conv1D).
    """

    name: str
    module: nn.Module
    role: Role
    sublayer: Sublayer
    block: int
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """The weight as ``out in``: a view on the module's parameter, whatever its layout."""
        weight: Tensor = self.module.weight.data  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias as ``out``, or None if it has none."""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return None if bias is None else bias.data

    def point_to(self, weight: Tensor) -> None:
        """Make the module use this ``out in`` tensor from now on, by reference: nothing is copied."""
        self.module.weight.data = weight.T if self.transposed else weight

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def n_weights(self) -> int:
        return self.weight.numel()


@dataclass(frozen=True)
class Block:
    """One decoder block: its module and its prunable projections in order of use.

    Args:
        index: place in the stack.
        name: full path, e.g. ``model.layers.3``.
        module: the live module.
        linears: attention's projections first, then the MLP's.
        n_heads: query heads; 0 in a block without attention.
        n_kv_heads: key/value heads (= n_heads without grouping).
        head_dim: width of a head.
        ffn_width: channels between up and down; 0 in a block without MLP.
        norms: full paths of the norms inside the block.
        window: how many tokens its attention sees at most, or None for all of them.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[Linear, ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_width: int
    norms: tuple[str, ...]
    window: int | None

    @property
    def whole(self) -> Kept:
        """All of its units."""
        return Kept(self.n_kv_heads, self.ffn_width)

    def attended(self, context: int) -> int:
        """Tokens that a token at the end of `context` tokens (itself included) attends to."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal LM.

    Args:
        family: the config's `model_type`.
        model: the whole model.
        container: the module list that holds the blocks.
        blocks: the blocks in order.
        embedding: the token embedding.
        tail: from the last block's output ``batch length width`` to the input of the head (final norm and
            other modules of the family, e.g. OPT's output projection).
        head: the output projection, an ``nn.Linear`` (it may share the embedding's weight).
        logits: from the input of the head to the logits as the model itself gives them (head and, in some
            families, scaling and soft-capping).
        width: of the residual stream.
        vocab_size: number of logits.
        final_norm: full path of the final norm, or "" if the family has none (OPT-350m).
        bos: token that every window begins with; None if windows begin with the text.
    """

    family: str
    model: nn.Module
    container: nn.ModuleList
    blocks: tuple[Block, ...]
    embedding: nn.Embedding
    tail: Callable[[Tensor], Tensor]
    head: nn.Linear
    logits: Callable[[Tensor], Tensor]
    width: int
    vocab_size: int
    final_norm: str
    bos: int | None = None

    @property
    def first_scored(self) -> int:
        """First position of a window whose prediction counts: that from a BOS token alone is alike in all windows."""
        return 0 if self.bos is None else 1

    @property
    def linears(self) -> Iterator[Linear]:
        """All prunable projections, block by block."""
        for block in self.blocks:
            yield from block.linears
