"""Runs of a causal LM block by block, with the model's own arguments of each block; and in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.compiled import call, compiled_call


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of the stack of blocks for one batch of token windows.

    Args:
        hidden: input of the first block.
        calls: for each block its further positional arguments and its keyword arguments.
    """

    hidden: Float[Tensor, "batch length width"]
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class _CapturedError(Exception):
    """All arguments are known: the rest of the forward pass is not needed."""


class BlockRunner:
    """Runs single blocks of a model, so that work on shared prefixes is done once.

    The arguments of each block (masks, position embeddings) are captured from the model's own forward pass, so
    that any family works; tests hold the logits against the model's own.

    Args:
        anatomy: the model, in eval mode.
        compiled: run `block` by `torch.compile`; the numbers differ by rounding.
    """

    def __init__(self, anatomy: Anatomy, *, compiled: bool = False) -> None:
        self.anatomy = anatomy
        self._call = compiled_call() if compiled else call
        self.device = anatomy.embedding.weight.device

    @torch.no_grad()
    def start(self, tokens: Int[Tensor, "batch length"]) -> BlockInputs:
        """Embed the tokens and capture every block's arguments; no block is computed."""
        modules = [block.module for block in self.anatomy.blocks]
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            first.append(hidden)
            calls.append((args[1:], kwargs))
            if len(calls) == len(modules):
                raise _CapturedError
            n_outputs = self.anatomy.n_outputs
            return (hidden, *[None] * (n_outputs - 1)) if n_outputs else hidden

        with _replaced_forward(modules, record):
            try:
                self.anatomy.model(input_ids=tokens.to(self.device), use_cache=False)
            except _CapturedError:
                return BlockInputs(first[0], tuple(calls))
        raise RuntimeError(f"Expected the forward pass to call {len(modules)} blocks, got {len(calls)}.")

    @torch.no_grad()
    def block(
        self, index: int, hidden: Float[Tensor, "batch length width"], inputs: BlockInputs
    ) -> Float[Tensor, "batch length width"]:
        """Output of one block, with the weights that it has now."""
        args, kwargs = inputs.calls[index]
        return _first(self._call(self.anatomy.blocks[index].module, hidden, *args, **kwargs))

    def graph(
        self, index: int, hidden: Float[Tensor, "batch length width"], inputs: BlockInputs
    ) -> Float[Tensor, "batch length width"]:
        """`block` for a backward pass: with the graph, where gradients are enabled."""
        args, kwargs = inputs.calls[index]
        return _first(self.anatomy.blocks[index].module(hidden, *args, **kwargs))

    @torch.no_grad()
    def run(self, inputs: BlockInputs) -> Float[Tensor, "batch length width"]:
        """Output of the last block."""
        hidden = inputs.hidden
        for index in range(len(self.anatomy.blocks)):
            hidden = self.block(index, hidden, inputs)
        return hidden


def _first(output: Any) -> Tensor:
    """Hidden states of a block's output."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def _replaced_forward(modules: list[nn.Module], forward: Any) -> Iterator[None]:
    """Replace `forward` on the instances: their other attributes stay visible to the model."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


LOWER = (torch.float16, torch.bfloat16)


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Context in which parameters and buffers of lower precision are in fp32."""
    lower = [x for x in (*model.parameters(), *model.buffers()) if x.dtype in LOWER]
    stored = [x.data for x in lower]
    try:
        for x in lower:
            x.data = x.data.float()
        yield
    finally:
        for x, data in zip(lower, stored, strict=True):
            x.data = data


def fp32_bytes(model: nn.Module) -> int:
    """Memory of `in_fp32` beyond the model."""
    return sum(x.numel() for x in model.parameters() if x.dtype in LOWER) * 4
