"""Run of one block, with what its modules got and gave."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import nn

from secateur.pruners.models.anatomy import Block
from secateur.pruners.models.runner import BlockInputs, BlockRunner


class Seen(NamedTuple):
    """First input and output of each module of a block in one run, by the module."""

    inputs: dict[nn.Module, Any]
    outputs: dict[nn.Module, Any]


def observe(runner: BlockRunner, block: Block, inputs: BlockInputs) -> Seen:
    """One run of a block, with hooks on its modules."""
    seen = Seen({}, {})

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.inputs[module] = args[0] if args else next(iter(kwargs.values()), None)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.outputs[module] = output

    with ExitStack() as hooks:
        for module in block.module.modules():
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        runner.block(block.index, inputs.hidden, inputs)
    return seen
