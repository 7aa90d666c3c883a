"""Stream a model block by block over the calibration tokens and collect what its projections see."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.families.anatomy import Anatomy, Block
from secateur.pruners.runner import BlockInputs, BlockRunner
from secateur.pruners.statistics import InputStatistics

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
    runner = BlockRunner(anatomy)
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    batches = [runner.start(part) for part in tokens.split(rows)]
    hidden = [batch.hidden for batch in batches]
    for block in anatomy.blocks:
        full = gram if isinstance(gram, bool) else block.index in gram
        statistics, outputs = _collect(runner, block, hidden, batches, gram=full)
        yield BlockStatistics(block, statistics)
        hidden = _advance(runner, block, hidden, batches) if sequential else outputs


def _advance(
    runner: BlockRunner, block: Block, hidden: list[Tensor], batches: list[BlockInputs]
) -> list[Float[Tensor, "batch length width"]]:
    return [runner.block(block.index, states, batch) for states, batch in zip(hidden, batches, strict=True)]


def _collect(
    runner: BlockRunner, block: Block, hidden: list[Tensor], batches: list[BlockInputs], *, gram: bool
) -> tuple[dict[str, InputStatistics], list[Float[Tensor, "batch length width"]]]:
    """One pass over the block with hooks on its projections: statistics and outputs."""
    collector = _Collector(gram=gram)
    with ExitStack() as hooks:
        for linear in block.linears:
            hook = linear.module.register_forward_pre_hook(collector.hook(linear.name))
            hooks.callback(hook.remove)
        outputs = _advance(runner, block, hidden, batches)
    missing = [linear.name for linear in block.linears if linear.name not in collector.by_name]
    if missing:
        raise RuntimeError(f"Expected a forward pass to call every projection, got no call of {missing}.")
    return collector.by_name, outputs


class _Collector:
    """Adds up inputs; a tensor that several projections get in turn is added once."""

    def __init__(self, *, gram: bool) -> None:
        self.by_name: dict[str, InputStatistics] = {}
        self._gram = gram
        self._last: Tensor | None = None
        self._last_name = ""

    def hook(self, name: str):  # type: ignore[no-untyped-def]  # torch's hook protocol
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            if inputs is self._last:
                # Shared with the projection before: one accumulation serves both.
                self.by_name.setdefault(name, self.by_name[self._last_name])
                return
            self._last, self._last_name = inputs, name
            if name not in self.by_name:
                self.by_name[name] = InputStatistics.empty(
                    inputs.shape[-1], gram=self._gram, device=inputs.device
                )
            self.by_name[name].add(inputs)

        return add
