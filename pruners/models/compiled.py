"""Call of a block compiled by `torch.compile`, one for all blocks of a shape."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from secateur.pruners.models.checkpoints.checkpoint import one_line


def call(block: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """The block's output, as it is."""
    return block(hidden, *args, **kwargs)


@cache
def compiled_call() -> Any:
    """`call` compiled: once for each shape of blocks and batches; weights are its inputs, so that they may change.

    Shapes are static, so that no result depends on what was computed before.
    """
    return torch.compile(call, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Raise a ValueError where `torch.compile` finds no compiler for the device."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        torch.compile(double)(torch.ones(2, device=device))
    except Exception as error:  # what the compiler lacks is named by classes that are torch's own
        raise ValueError(
            f"Expected a compiler that `torch.compile` can use on {device}, got none ({one_line(error, 200)}). "
            "Install one, or set `compile: never`."
        ) from error
