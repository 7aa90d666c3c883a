"""A live model with parts cut away, in the form in which it is saved: weights, names and numbers of kept units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from secateur.pruners.export.export_check import Comparison
from secateur.pruners.models.anatomy import Anatomy, Block, Sublayer
from secateur.pruners.models.check_kept import check_kept
from secateur.pruners.models.discover import text_config
from secateur.pruners.models.experts import joined_experts
from secateur.pruners.models.mixture import Mixture
from secateur.pruners.models.narrow import Narrow, narrowed
from secateur.pruners.models.placement import ALL, Form, Placement, place, place_vectors
from secateur.pruners.models.stream_axes import width_fields
from secateur.spaces.architecture.candidate import Kept

BLOCKWISE = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "attention_layers",
    "layers_block_type",
    "block_types",
)
"""Lists in configs with a place for each block; shorter ones are repeated (RecurrentGemma)."""

PLACES = ("attn_layer_indices",)
"""Lists in configs of blocks' places."""


EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")
"""Names in configs of the channels of a routed expert."""

TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk")
"""Names in configs of the number of experts that a token is routed to."""


@dataclass(frozen=True)
class CutModel:
    """A causal LM in memory whose weights are cut, or will be, and whose config is the dense one.

    Args:
        anatomy: found before the cut: `Block.n_heads` and the like are the dense numbers, the modules the live ones.
            The parameters of removed sub-layers and of their norms are empty.
        kept: of each block.
        planned: the model is still dense; weights are given without memory, in the shapes that they will have.
        narrow: hidden channels that stay; None: all. The live tensors have all of them.

    Raises:
        ValueError: if `kept` does not fit the model.
    """

    anatomy: Anatomy
    kept: Sequence[Kept]
    planned: bool = False
    narrow: Narrow | None = None

    def __post_init__(self) -> None:
        check_kept(self.anatomy, self.kept)

    @property
    def config(self) -> Any:
        """The dense model's."""
        return self.anatomy.model.config

    @property
    def width(self) -> int:
        """Hidden channels."""
        return self.anatomy.width if self.narrow is None else len(self.narrow.channels)

    @property
    def is_nested(self) -> bool:
        """True if the language tower is a part of the model."""
        return text_config(self.config) is not self.config

    def text_part(self, content: dict[str, Any]) -> dict[str, Any]:
        """The language tower's part of a config's content: all of it, unless the tower is a part of the model."""
        part: dict[str, Any] = content["text_config"] if self.is_nested else content
        return part

    @cached_property
    def kept_blocks(self) -> tuple[int, ...]:
        """Blocks that are saved, by their places in the dense model: those with kept units.

        All of them where a config can't be without some, as their kinds follow from their places (Jamba): the others
        are saved without sub-layers.
        """
        every = tuple(range(len(self.kept)))
        some = tuple(index for index in every if self.kept[index].kv_groups or self.kept[index].ffn)
        return some if some == every or self._can_leave_out(some) else every

    def _can_leave_out(self, some: Sequence[int]) -> bool:
        """True if the family's class with a config of these blocks alone builds each as it is in the dense model."""
        stem = self.anatomy.blocks[0].name.rpartition(".")[0]
        try:
            fewer = self.skeleton(type(self.config)(**self._content(some)))
        except (
            ValueError,
            TypeError,
            LookupError,
            StrictDataclassError,
        ):  # validators, or lists that don't fit
            return False
        dense = self.skeleton(self.config)
        return all(
            _shapes(fewer.get_submodule(f"{stem}.{place}")) == _shapes(dense.get_submodule(f"{stem}.{index}"))
            for place, index in enumerate(some)
        )

    @property
    def alike(self) -> bool:
        """True if the kept blocks have one shape: those with a mixture, and those with an MLP."""
        kept = [
            (self.kept[index], self.anatomy.blocks[index].mixture is not None) for index in self.kept_blocks
        ]
        with_heads = [index for index in self.kept_blocks if self.anatomy.blocks[index].n_heads]
        same_groups = len({self.kept[index][:1] + self.kept[index][2:3] for index in with_heads}) <= 1
        ffn = [((units.ffn, units.channels, units.shared), mixed) for units, mixed in kept if units.ffn]
        same = all(len({units for units, mixed in ffn if mixed == kind}) <= 1 for kind in (True, False))
        return same_groups and same and not any(self._lacks(index) for index in self.kept_blocks)

    def _lacks(self, index: int) -> bool:
        """True if a block is without a sub-layer that it had."""
        dense, kept = self.anatomy.blocks[index].whole.units, self.kept[index].units
        return any(had and not has for had, has in zip(dense, kept, strict=True))

    def shape(self, index: int) -> dict[str, int]:
        """Heads, and channels or experts, that a block keeps, by their names in configs."""
        block, kept = self.anatomy.blocks[index], self.kept[index]
        heads = {
            "num_attention_heads": kept.kv_groups * self.heads_per_group(index),
            "num_key_value_heads": kept.kv_groups,
        }
        return (heads if block.n_heads else {}) | self.ffn_shape(index, kept.ffn)

    @property
    def head_dim(self) -> dict[str, int]:
        """Width of the heads, for configs that would compute another from their number."""
        computed = isinstance(getattr(type(self.config), "head_dim", None), property)
        block = self.with_heads
        of_latent = block.heads.kv_rows  # its widths have names of their own
        return {} if computed or of_latent or not block.head_dim else {"head_dim": block.head_dim}

    @property
    def with_heads(self) -> Block:
        """The first block with heads, that keeps some if there is one; the first one if none has any."""
        blocks = [block for block in self.anatomy.blocks if block.n_heads]
        keeps = [block for block in blocks if self.kept[block.index].kv_groups]
        return (keeps or blocks or self.anatomy.blocks)[0]

    def heads_per_group(self, index: int) -> int:
        """Query heads that each kept KV group of a block keeps."""
        block = self.anatomy.blocks[index]
        return self.kept[index].queries or block.n_heads // max(block.attention_units, 1)

    def ffn_shape(self, index: int, n_kept: int) -> dict[str, int]:
        """So many channels; or so many experts in a block with a mixture, how many it uses, and their channels."""
        mixture = self.anatomy.blocks[index].mixture
        if mixture is None:
            return {"intermediate_size": n_kept} if self.anatomy.blocks[index].ffn_width else {}
        content = self.config.to_dict()
        numbers = {
            name: n_kept
            for name, value in content.items()
            if "expert" in name
            and "shared" not in name
            and "per_tok" not in name
            and value == mixture.n_experts
        }
        used = {
            name: n_kept for name in TOP_K if content.get(name) == mixture.top_k and n_kept < mixture.top_k
        }
        channels = self.kept[index].channels
        width = next((name for name in EXPERT_WIDTHS if name in content), "")
        return numbers | used | ({width: channels} if channels and width else {})

    def base_config(self) -> dict[str, Any]:
        """The dense config's content for a model of the kept blocks, with their dense shapes."""
        content = self._content(self.kept_blocks)
        if self.narrow is not None:
            content |= width_fields(self.anatomy, self.width)
        return content

    def _content(self, blocks: Sequence[int]) -> dict[str, Any]:
        """The dense config's content for a model of these blocks."""
        content: dict[str, Any] = self.config.to_dict()
        inner, of = self.text_part(content), text_config(self.config)
        for name in BLOCKWISE:
            values = inner.get(name)
            if isinstance(values, list) and values and len(blocks) < of.num_hidden_layers:
                inner[name] = [values[index % len(values)] for index in blocks]
        for name in PLACES:
            if isinstance(inner.get(name), list):
                inner[name] = [place for place, index in enumerate(blocks) if index in inner[name]]
        inner[of.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(blocks)
        return content

    def saved_name(self, index: int) -> str:
        """Path of a kept block in the saved model, where blocks are numbered without gaps."""
        stem = self.anatomy.blocks[index].name.rpartition(".")[0]
        return f"{stem}.{self.kept_blocks.index(index)}"

    def weights(self) -> dict[str, Tensor]:
        """The live tensors under their names in a saved model, by reference; a tied weight once."""
        moved = {
            f"{block.name}.": f"{self.saved_name(block.index)}." if block.index in self.kept_blocks else None
            for block in self.anatomy.blocks
        }
        gone = {
            f"{x.name}."
            for x, kept in zip(self.anatomy.blocks, self.kept, strict=True)
            if not any(kept.units)
        }
        found = {}
        for name, value in self._values().items():
            old = next((old for old in moved if name.startswith(old)), "")
            new = moved.get(old, "")
            if new is not None and old not in gone:
                found[new + name.removeprefix(old)] = value
        return found

    def _values(self) -> dict[str, Tensor]:
        """Parameters and saved buffers under their live names, without empty ones."""
        model = self.anatomy.model
        narrow = narrowed(self.anatomy, self.narrow, planned=self.planned) if self.narrow else nullcontext()
        with narrow, joined_experts(model):
            saved = set(model.state_dict())
            named = [*model.named_parameters(), *model.named_buffers()]
            values = {name: value.detach() for name, value in named if name in saved}
        if self.planned:
            values = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
            values |= {name: values[name].new_empty(shape) for name, shape in self._planned_shapes(values)}
        return {name: value for name, value in values.items() if value.numel()}

    def _planned_shapes(self, dense: Mapping[str, Tensor]) -> Iterator[tuple[str, list[int]]]:
        """Shapes of the projections' weights and biases, by name, once they are cut from these."""
        for placement, n_kept, _, share in self.placements():
            linear = placement.linear
            weight, bias = linear.parameter, f"{linear.name}.bias"
            for full, axis in ((weight, placement.axis ^ linear.transposed), (bias, 0)):
                if full in dense and (full == weight or placement.axis == 0):
                    shape = list(dense[full].shape)
                    shape[axis] = placement.size(n_kept, share)
                    yield full, shape

        for block, kept in zip(self.anatomy.blocks, self.kept, strict=True):
            if block.mixture is not None:
                yield from _planned_experts(block, block.mixture, kept, dense)

    def placements(self, form: Form = "contiguous") -> Iterator[tuple[Placement, int, int, Fraction]]:
        """Places of the units in each projection, numbers of kept and of all units, and share of query heads."""
        for block, kept in zip(self.anatomy.blocks, self.kept, strict=True):
            attention = (*place(block, "attention", form), *place_vectors(block))
            for placement in attention if block.n_kv_heads else ():
                share = Fraction(self.heads_per_group(block.index) * block.n_kv_heads, block.n_heads)
                yield placement, kept.kv_groups, block.n_kv_heads, share
            for placement in place(block, "mlp", form):
                yield placement, kept.ffn, block.ffn_width, ALL

    def added_biases(self) -> list[str]:
        """Output projections, by their path in the saved model, that have a bias which the dense model hasn't."""
        wanted = {name for name, _ in self.skeleton(self.config).named_parameters()}
        return [
            f"{self.saved_name(block.index)}{linear.name.removeprefix(block.name)}"
            for block in self.anatomy.blocks
            if block.index in self.kept_blocks
            for linear in block.linears
            if linear.expert is None
            and f"{linear.name}.bias" not in wanted
            and isinstance(bias := linear.module.bias, Tensor)
            and bias.numel()
        ]

    def skeleton(self, config: Any) -> Any:
        """A model of the live one's class without memory for its weights."""
        with torch.device("meta"):
            return type(self.anatomy.model)(config)


@dataclass(frozen=True)
class Job:
    """A structured model to save.

    Args:
        cut: the live model.
        tokenizer: its tokenizer.
        parent: name of the dense model.
        dtype: of the saved weights.
        tokens: to compare logits on.
    """

    cut: CutModel
    tokenizer: PreTrainedTokenizerBase
    parent: str
    dtype: torch.dtype
    tokens: Int64[Tensor, "rows length"]


@dataclass(frozen=True)
class Saved:
    """A model that was written and checked.

    Args:
        comparison: with the model in memory.
        n_params: as stored.
        smaller: False if it has the parent's shapes.
    """

    comparison: Comparison
    n_params: int
    smaller: bool = True


def _planned_experts(
    block: Block, mixture: Mixture, kept: Kept, dense: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[int]]]:
    """Shapes of the tensors of a mixture with an entry an expert; all that is below its module, if none stays.

    And of shared experts, where they lose channels.
    """
    n_kept = kept.ffn
    for linear in block.linears if kept.shared else ():
        if linear.sublayer == "experts" and linear.expert is None:
            factor = 2 if linear.role == "gate_up" else 1
            shape = list(dense[f"{linear.name}.weight"].shape)
            shape[int(linear.is_output)] = factor * kept.shared
            yield f"{linear.name}.weight", shape
            if f"{linear.name}.bias" in dense and not linear.is_output:
                yield f"{linear.name}.bias", shape[:1]
    owners = {module: path for path, module in mixture.module.named_modules()}
    axes = {f"{mixture.name}.{owners[x.module]}.{x.name}".replace("..", "."): x.axis for x in mixture.entries}
    inside = f"{mixture.name}.{owners[mixture.experts]}."
    beside = [f"{x.name}." for x in block.linears if x.sublayer == "experts" and x.expert is None]
    for name, value in dense.items():
        shape = list(value.shape)
        if (name.startswith(f"{mixture.name}.") and not n_kept) or (
            name.startswith(tuple(beside)) and not n_kept
        ):
            yield name, [0] * len(shape)
        elif name in axes or name.startswith(inside):
            shape[axes.get(name, 0)] = n_kept
            axis = _axis_of_channels(name, transposed=mixture.experts.transposed)
            if kept.channels and name.startswith(inside) and axis is not None:
                shape[axis] = shape[axis] // mixture.n_channels * kept.channels
            yield name, shape


def _axis_of_channels(name: str, *, transposed: bool) -> int | None:
    """Axis of the channels in a fused tensor of experts; None in the bias of their outputs."""
    own = name.rpartition(".")[2]
    if own.endswith("_bias"):
        return None if own.startswith("down") else 1
    return 2 if own.startswith("down") != transposed else 1


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in block.named_parameters()}


def sublayer_path(block: Block, sublayer: Sublayer) -> str:
    """Path of the module that a sub-layer is, within the block; "" where it has none of its own (OPT's MLP)."""
    if sublayer == "mlp" and block.mixture is not None:
        return block.mixture.name.removeprefix(block.name).removeprefix(".")
    parents = [x.name.split(".")[:-1] for x in block.linears if x.sublayer == sublayer]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    return ".".join(part for part, *_ in common).removeprefix(block.name).removeprefix(".")


def stored(weights: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], bool]:
    """The tensors as a file takes them: in this dtype, on the CPU, contiguous, each with memory of its own.

    Returns:
        They, and whether the dtype changed any value. Buffers of whole numbers keep their dtype.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    lossy = False
    for name, value in weights.items():
        kind = dtype if value.is_floating_point() else value.dtype
        tensor = value.to("cpu", kind).contiguous()
        lossy |= kind != value.dtype and not torch.equal(tensor.to(value.dtype), value.cpu())
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.numel() * tensor.itemsize or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found, lossy
