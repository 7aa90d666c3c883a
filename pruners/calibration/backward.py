"""Walk of a loss's gradient back through a model, from the last block to the first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Anatomy, Block, Linear
from secateur.pruners.models.runner import BlockInputs, BlockRunner

Top = Callable[[int, Tensor], Tensor]
"""From a batch's number and the last block's output to the gradient of the loss with respect to that output."""

CHUNK_TOKENS = 128
"""Positions whose logits are in memory at a time."""

Add = Callable[[Linear, Tensor, Tensor], None]
"""Consumer of one call of a projection: its inputs ``tokens in`` and the gradients of its outputs ``tokens out``."""


def backward_blocks(
    anatomy: Anatomy,
    batches: Sequence[BlockInputs],
    top: Top,
    add: Add,
    *,
    watched: Collection[str],
    before: Callable[[int], None] = lambda block: None,
) -> Iterator[Block]:
    """Yield each block from the last to the first, after `add` saw all calls of its watched projections.

    The gradient is that of the loss of the whole model, exact. A block's forward pass is run again beside its
    backward pass, so that memory beyond the model is the batches' hidden states before every block, and the
    activations of one block for one batch.

    Args:
        anatomy: the model, with the weights that `before` gives it.
        batches: inputs of the stack.
        top: of the loss.
        add: given calls, batch by batch, in the projection's dtype.
        watched: full names of projections.
        before: called with a block's index before it is computed, once in each direction.

    Raises:
        ValueError: if a gradient is not finite.
    """
    runner = BlockRunner(anatomy)
    states = [[batch.hidden for batch in batches]]
    with torch.no_grad():
        for block in anatomy.blocks:
            before(block.index)
            below = [runner.block(block.index, x, it) for x, it in zip(states[-1], batches, strict=True)]
            states.append(below)
    gradients = [top(number, x) for number, x in enumerate(states.pop())]
    for block in reversed(anatomy.blocks):
        before(block.index)
        linears = [linear for linear in block.linears if linear.name in watched]
        for number, (hidden, batch) in enumerate(zip(states.pop(), batches, strict=True)):
            with _Calls(linears) as calls, torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                output = runner.graph(block.index, leaf, batch)
                outputs = [call[2] for call in calls.found]
                found = torch.autograd.grad(output, [leaf, *outputs], gradients[number], allow_unused=True)
            gradients[number] = _finite(found[0], block.name)
            for (linear, inputs, _), gradient in zip(calls.found, found[1:], strict=True):
                if gradient is not None:
                    add(linear, inputs.flatten(0, -2), gradient.flatten(0, -2))
        yield block


class _Calls:
    """Calls of some projections while a block runs: inputs, and outputs as parts of the graph."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = linears
        self.found: list[tuple[Linear, Tensor, Tensor]] = []

    def __enter__(self) -> _Calls:
        self._hooks = [x.module.register_forward_hook(self._recorder(x)) for x in self._linears]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _recorder(self, linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.found.append((linear, args[0].detach(), output))

        return record


def _finite(gradient: Float[Tensor, "..."] | None, name: str) -> Tensor:
    if gradient is None or not torch.isfinite(gradient).all():
        raise ValueError(
            f"Expected finite gradients, got NaN or infinity at {name}. Check the model and the text."
        )
    return gradient.detach()


def head_gradient(
    anatomy: Anatomy,
    hidden: Float[Tensor, "batch length width"],
    of_logits: Callable[[int, Float[Tensor, "tokens vocab"]], Float[Tensor, "tokens vocab"]],
) -> Float[Tensor, "batch length width"]:
    """Gradient of a loss with respect to the last block's output, in chunks of positions.

    Args:
        hidden: the last block's output.
        of_logits: from the number of a chunk and its logits in fp32 to the loss's gradient with respect to them.
    """
    found = []
    for number, chunk in enumerate(hidden.flatten(0, 1).split(CHUNK_TOKENS)):
        leaf = chunk.detach().requires_grad_()
        with torch.enable_grad():
            logits = anatomy.logits(anatomy.tail(leaf)).float()
        with torch.no_grad():
            upper = of_logits(number, logits.detach())
        found.append(torch.autograd.grad(logits, leaf, upper)[0])
    return torch.cat(found).view_as(hidden)
