"""Parts of a causal LM, as found by structure, around the live modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.pruners.models.experts import Expert
from secateur.pruners.models.mixture import Mixture
from secateur.pruners.models.room import Room
from secateur.spaces.architecture.candidate import Kept

Sublayer = Literal["attention", "recurrent", "mlp", "experts"]
"""Kinds of mixers: attention (latent attention, too); a state-space model, linear attention or convolution over tokens;
an MLP; a mixture of experts, routed and shared."""

Role = Literal["q", "k", "v", "kv", "qkv", "in", "o", "gate", "up", "gate_up", "down"]
"""Functions of projections; ``kv``: keys and values of each head from a latent state, head by head; ``in``: another
one, whose outputs stay inside the mixer."""


@dataclass(frozen=True)
class Linear:
    """One prunable projection of a block.

    Args:
        name: its full path in the model, e.g. ``model.layers.3.self_attn.q_proj``.
        module: the live module, an ``nn.Linear`` or a Conv1D (weight stored transposed).
        role: its function in the block; ``qkv`` and ``gate_up`` are fused projections.
        sublayer: kind of its mixer.
        block: index of its block.
        transposed: True if the module stores its weight as ``in out`` (GPT-2's Conv1D).
        expert: the routed expert of a mixture that it belongs to; None elsewhere.
    """

    name: str
    module: nn.Module
    role: Role
    sublayer: Sublayer
    block: int
    transposed: bool
    expert: Expert | None = None

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

    @property
    def is_output(self) -> bool:
        """True if its outputs are those of its mixer."""
        return self.role in ("o", "down")

    @property
    def parameter(self) -> str:
        """Full name of its weight."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class HeadVector(Linear):
    """A number for each query head, such as the sinks of gpt-oss, as a matrix of one column; never pruned by itself."""

    @property
    def weight(self) -> Tensor:
        return self._owned.data[:, None]

    @property
    def bias(self) -> Tensor | None:
        return None

    def point_to(self, weight: Tensor) -> None:
        self._owned.data = weight[:, 0]

    @property
    def parameter(self) -> str:
        return self.name

    @property
    def _owned(self) -> Tensor:
        owned: Tensor = getattr(self.module, self.name.rpartition(".")[2])
        return owned


@dataclass(frozen=True)
class Heads:
    """Heads of an attention.

    Args:
        n_queries: query heads.
        n_kv: key/value heads (= `n_queries` without grouping).
        width: of a head.
        query_rows: rows of the queries' projection for each query head; 0: its width.
        kv_rows: rows of the projection ``kv`` for each head; 0 where there is none.
    """

    n_queries: int
    n_kv: int
    width: int
    query_rows: int = 0
    kv_rows: int = 0


@dataclass(frozen=True)
class Mixer:
    """Sub-layer of a block, whose output is added to the residual stream.

    Args:
        kind: what it mixes, and how.
        linears: its prunable projections in order of use, the output projection last.
        heads: of an attention that consists of q, k, v and o, fused or not, or of a latent one; else None.
        channels: of an MLP of up and down, with a gate or without, fused or not; of a mixture those of its shared
            experts, if they are one such MLP; else 0.
        score_macs: multiply-accumulates of its attention for one token and one token that it attends to.
        cache_width: numbers that one token adds to its cache; 0 of a state of fixed size.
        mixture: router and routed experts of a mixture of experts; else None.
        vectors: of an attention with a number for each query head, beside its projections.
    """

    kind: Sublayer
    linears: tuple[Linear, ...]
    heads: Heads | None = None
    channels: int = 0
    score_macs: int = 0
    cache_width: int = 0
    mixture: Mixture | None = None
    vectors: tuple[HeadVector, ...] = ()


@dataclass(frozen=True)
class Block:
    """One decoder block: its module and its mixers.

    Args:
        index: place in the stack.
        name: full path, e.g. ``model.layers.3``.
        module: the live module.
        mixers: those over tokens first, then the MLPs.
        norms: full paths of the norms inside the block.
        window: how many tokens its attention sees at most, or None for all of them.
        unknown: paths within the block of matrices that nothing here understands; they are never pruned.
    """

    index: int
    name: str
    module: nn.Module
    mixers: tuple[Mixer, ...]
    norms: tuple[str, ...]
    window: int | None
    unknown: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The prunable projections, mixer by mixer."""
        return tuple(linear for mixer in self.mixers for linear in mixer.linears)

    def mixer(self, kind: Sublayer) -> Mixer | None:
        """The mixer of this kind, or None if there is none, or more than one."""
        found = [mixer for mixer in self.mixers if mixer.kind == kind]
        return found[0] if len(found) == 1 else None

    @property
    def mixture(self) -> Mixture | None:
        """Router and routed experts; None in a block without."""
        found = self.mixer("experts")
        return None if found is None else found.mixture

    @property
    def heads(self) -> Heads:
        """Heads of the attention; none in a block without, or with one that has no units."""
        attention = self.mixer("attention")
        return Heads(0, 0, 0) if attention is None or attention.heads is None else attention.heads

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.heads.n_queries

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads (= `n_heads` without grouping)."""
        return self.heads.n_kv

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.heads.width

    @property
    def ffn_width(self) -> int:
        """Channels between up and down; 0 in a block without an MLP of such."""
        mlp = self.mixer("mlp")
        return 0 if mlp is None else mlp.channels

    @property
    def shared_channels(self) -> int:
        """Channels of the shared experts of a mixture; 0 without such."""
        experts = self.mixer("experts")
        return 0 if experts is None else experts.channels

    @property
    def attention_units(self) -> int:
        """Units of its mixer over tokens: KV groups, or one if it has no such heads or is recurrent; 0: none."""
        return self.n_kv_heads or int(any(mixer.kind in ("attention", "recurrent") for mixer in self.mixers))

    @property
    def ffn_units(self) -> int:
        """Units of its MLP: channels, or the routed experts of a mixture."""
        return self.ffn_width if self.mixture is None else self.mixture.n_experts

    @property
    def whole(self) -> Kept:
        """All of its units."""
        return Kept(self.attention_units, self.ffn_units)

    def attended(self, context: int) -> int:
        """Tokens that a token at the end of `context` tokens (itself included) attends to."""
        return context if self.window is None else min(context, self.window)


def live(block: Block) -> AbstractContextManager[None]:
    """Context of a block whose weights are in memory anyway."""
    return nullcontext()


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
        n_outputs: length of the tuple that a block returns; 0 if it is a bare tensor.
        bos: token that every window begins with; None if windows begin with the text.
        all_experts: statistics of the projections of routed experts are of all calibration tokens, not only of those
            that are routed to them.
        hold: context in which a block's weights are those that it computes with; elsewhere those of a streamed model
            may be the stored ones, in another dtype, see `MappedModel`.
        precision: dtype that projections compute in; None: that of their weights.
        room: of its device beside the weights; None on a CPU, where work and caches have fixed sizes.
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
    n_outputs: int = 0
    bos: int | None = None
    all_experts: bool = False
    hold: Callable[[Block], AbstractContextManager[None]] = live
    precision: torch.dtype | None = None
    room: Room | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that projections compute in."""
        return self.precision or next(self.linears).weight.dtype

    @property
    def first_scored(self) -> int:
        """First position of a window whose prediction counts: that from a BOS token alone is alike in all windows."""
        return 0 if self.bos is None else 1

    @property
    def linears(self) -> Iterator[Linear]:
        """All prunable projections, block by block."""
        for block in self.blocks:
            yield from block.linears
