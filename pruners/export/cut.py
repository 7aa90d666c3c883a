"""A live model with parts cut away, as what a saved one is made from: its weights, and what its blocks keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy, Block, Sublayer
from secateur.pruners.models.layout import check_kept, place
from secateur.spaces.architecture.candidate import Kept


@dataclass(frozen=True)
class CutModel:
    """A causal LM in memory whose weights are cut, or will be, and whose config is still the dense one.

    Args:
        anatomy: found before the cut: `Block.n_heads` and the like are the dense numbers, the modules the live ones.
            The parameters of removed sub-layers and of their norms are empty.
        kept: of each block.
        planned: the model is still dense; weights are given without memory, in the shapes that they will have.

    Raises:
        ValueError: if `kept` does not fit the model.
    """

    anatomy: Anatomy
    kept: Sequence[Kept]
    planned: bool = False

    def __post_init__(self) -> None:
        check_kept(self.anatomy, self.kept)

    @property
    def config(self) -> Any:
        """The dense model's."""
        return self.anatomy.model.config

    @cached_property
    def stays(self) -> tuple[int, ...]:
        """The blocks that keep anything, by their places in the dense model."""
        return tuple(index for index, kept in enumerate(self.kept) if kept.kv_groups or kept.ffn)

    def n_heads(self, index: int) -> int:
        """Query heads that a block keeps."""
        block = self.anatomy.blocks[index]
        return self.kept[index].kv_groups * (block.n_heads // block.n_kv_heads)

    def shape(self, index: int) -> dict[str, int]:
        """Heads and channels that a block keeps, by their names in configs."""
        return {
            "num_attention_heads": self.n_heads(index),
            "num_key_value_heads": self.kept[index].kv_groups,
            "intermediate_size": self.kept[index].ffn,
        }

    def saved_name(self, index: int) -> str:
        """Path in the saved model of a block that stays: blocks that went leave no gap."""
        stem = self.anatomy.blocks[index].name.rpartition(".")[0]
        return f"{stem}.{self.stays.index(index)}"

    def weights(self) -> dict[str, Tensor]:
        """The live tensors under their names in a saved model, by reference; a tied weight once."""
        moved = {
            f"{block.name}.": f"{self.saved_name(block.index)}." if block.index in self.stays else None
            for block in self.anatomy.blocks
        }
        found = {}
        for name, value in self._values().items():
            old = next((old for old in moved if name.startswith(old)), "")
            new = moved.get(old, "")
            if new is not None:
                found[new + name.removeprefix(old)] = value
        return found

    def _values(self) -> dict[str, Tensor]:
        """Parameters and saved buffers under their live names, without the empty ones."""
        model = self.anatomy.model
        saved = set(model.state_dict())
        named = [*model.named_parameters(), *model.named_buffers()]
        values = {name: value.detach() for name, value in named if name in saved}
        if self.planned:
            values = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
            values |= {name: values[name].new_empty(shape) for name, shape in self._planned_shapes(values)}
        return {name: value for name, value in values.items() if value.numel()}

    def _planned_shapes(self, dense: Mapping[str, Tensor]) -> Iterator[tuple[str, list[int]]]:
        """Shapes of the projections' weights and biases, by name, once they are cut from these."""
        for block, kept in zip(self.anatomy.blocks, self.kept, strict=True):
            kinds: dict[Sublayer, int] = {"attention": kept.kv_groups, "mlp": kept.ffn}
            for placement in (x for kind in kinds for x in place(block, kind, "contiguous")):
                linear, n_kept = placement.linear, kinds[placement.linear.sublayer]
                for name, axis in (("weight", placement.axis ^ linear.transposed), ("bias", 0)):
                    full = f"{linear.name}.{name}"
                    if full in dense and (name == "weight" or placement.axis == 0):
                        shape = list(dense[full].shape)
                        shape[axis] = sum(placement.parts) * n_kept
                        yield full, shape

    def added_biases(self) -> list[str]:
        """Output projections, by their path in the saved model, that have a bias which the dense model hasn't."""
        wanted = {name for name, _ in self.skeleton(self.config).named_parameters()}
        return [
            f"{self.saved_name(block.index)}{linear.name.removeprefix(block.name)}"
            for block in self.anatomy.blocks
            if block.index in self.stays
            for linear in block.linears
            if f"{linear.name}.bias" not in wanted
            and isinstance(bias := linear.module.bias, Tensor)
            and bias.numel()
        ]

    def skeleton(self, config: Any) -> Any:
        """A model of the live one's class without memory for its weights."""
        with torch.device("meta"):
            return type(self.anatomy.model)(config)


def sublayer_path(block: Block, sublayer: Sublayer) -> str:
    """Path of the module that a sub-layer is, within the block; "" where it has none of its own (OPT's MLP)."""
    parents = {x.name.rpartition(".")[0] for x in block.linears if x.sublayer == sublayer}
    return parents.pop().removeprefix(block.name).removeprefix(".") if len(parents) == 1 else ""


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
