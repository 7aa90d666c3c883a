"""Stream a model block by block over the calibration tokens and collect what its projections see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.models.anatomy import Anatomy, Block, Linear
from secateur.pruners.models.runner import BlockInputs, BlockRunner

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class BlockStatistics:
    """A block with the input statistics of its projections, by the projection's full name.

    Projections that read the same input (q, k and v; gate and up) share one object.
    """

    block: Block
    inputs: dict[str, InputStatistics]


@torch.no_grad()
def stream_blocks(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    *,
    gram: bool | Collection[int],
    sequential: bool,
) -> Iterator[BlockStatistics]:
    """Yield each block with its statistics; the consumer may prune the block before it asks for the next.

    Memory beyond the model: the hidden states of the calibration tokens and one block's statistics.

    Args:
        anatomy: the model.
        tokens: calibration windows.
        gram: collect full second moments, not only their diagonal; or the indices of the blocks where to do so.
        sequential: compute a block's output after the consumer had it, with its pruned weights, so that later
            statistics come from already pruned blocks. Otherwise one pass serves statistics and output, and
            all statistics are the dense model's, if the consumer leaves the weights as they are.
    """
    walk = Walk(anatomy, tokens)
    for block in anatomy.blocks:
        collector = InputCollector(gram=gram if isinstance(gram, bool) else block.index in gram)
        outputs = walk.through(block, [collector.hook])
        yield BlockStatistics(block, collector.of(block))
        walk.hidden = walk.through(block) if sequential else outputs


Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
"""Called before each forward pass of a projection."""

HookOf = Callable[[Linear], Hook | None]
"""None: the projection is of no interest."""


class Walk:
    """The calibration tokens on their way through the model: before each block, the hidden states that it gets.

    Args:
        anatomy: the model.
        tokens: calibration windows.
    """

    def __init__(self, anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> None:
        self._runner = BlockRunner(anatomy)
        rows = max(1, BATCH_TOKENS // tokens.shape[1])
        self._batches: list[BlockInputs] = [self._runner.start(part) for part in tokens.split(rows)]
        self.hidden: list[Float[Tensor, "batch length width"]] = [batch.hidden for batch in self._batches]

    def through(
        self, block: Block, watch: Sequence[HookOf] = ()
    ) -> list[Float[Tensor, "batch length width"]]:
        """The block's outputs, with the weights that it has now; hooks see the inputs of its projections."""
        with ExitStack() as hooks:
            for linear in block.linears:
                for hook in filter(None, (hook_of(linear) for hook_of in watch)):
                    hooks.callback(linear.module.register_forward_pre_hook(hook).remove)
            return [
                self._runner.block(block.index, states, batch)
                for states, batch in zip(self.hidden, self._batches, strict=True)
            ]


class InputCollector:
    """Adds up inputs; a tensor that several projections get in turn is added once.

    Args:
        gram: collect full second moments, not only their diagonal.
    """

    def __init__(self, *, gram: bool) -> None:
        self._gram = gram
        self._found: dict[str, InputStatistics] = {}
        self._last: Tensor | None = None
        self._last_name = ""

    def of(self, block: Block) -> dict[str, InputStatistics]:
        """What was seen of the block's projections, by their full names.

        Raises:
            RuntimeError: if one of them was not called.
        """
        missing = [linear.name for linear in block.linears if linear.name not in self._found]
        if missing:
            raise RuntimeError(f"Expected a forward pass to call every projection, got no call of {missing}.")
        return self._found

    def hook(self, linear: Linear) -> Hook:
        """See `HookOf`."""

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            name, inputs = linear.name, args[0]
            if inputs is self._last:
                # Shared with the projection before: one accumulation serves both.
                self._found.setdefault(name, self._found[self._last_name])
                return
            self._last, self._last_name = inputs, name
            if name not in self._found:
                self._found[name] = InputStatistics.empty(
                    inputs.shape[-1], gram=self._gram, device=inputs.device
                )
            self._found[name].add(inputs)

        return add
