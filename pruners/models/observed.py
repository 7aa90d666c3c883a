"""Run of one block, with what its modules got and gave."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Block
from secateur.pruners.models.layout import Returns
from secateur.pruners.models.runner import BlockInputs, BlockRunner

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


class Seen(NamedTuple):
    """First input and output of each module of a block in one run, and its whole call, by the module."""

    inputs: dict[nn.Module, Any]
    outputs: dict[nn.Module, Any]
    calls: dict[nn.Module, Call]


def observe(runner: BlockRunner, block: Block, inputs: BlockInputs) -> Seen:
    """One run of a block, with hooks on its modules."""
    seen = Seen({}, {}, {})

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.inputs[module] = args[0] if args else next(iter(kwargs.values()), None)
        seen.calls[module] = args, kwargs

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.outputs[module] = output

    with ExitStack() as hooks:
        for module in block.module.modules():
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        runner.block(block.index, inputs.hidden, inputs)
    return seen


def returns_of(module: nn.Module, seen: Seen) -> Returns:
    """What a module gives, by one run of it and another with a moved stream."""
    if module not in seen.calls:
        return Returns()
    output = seen.outputs[module]
    if not isinstance(output, tuple):
        return Returns(0, _adds_stream(module, seen))
    return Returns(len(output), _adds_stream(module, seen), len(output) > 1 and _is_state(output[1]))


def _is_state(output: Any) -> bool:
    return isinstance(output, tuple) and all(isinstance(each, Tensor) for each in output)


@torch.no_grad()
def _adds_stream(module: nn.Module, seen: Seen) -> bool:
    """True if a module adds the second tensor that it gets to its output."""
    args, kwargs = seen.calls[module]
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if len(tensors) < 2 or tensors[0].shape != tensors[1].shape or not tensors[1].is_floating_point():
        return False
    stream = tensors[1]
    moved = [stream + 1 if x is stream else x for x in args]
    named = {name: stream + 1 if x is stream else x for name, x in kwargs.items()}
    before, after = (_first(x) for x in (seen.outputs[module], module(*moved, **named)))
    return before.shape == stream.shape and torch.allclose(after - before, torch.ones_like(after), atol=0.01)


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
