"""fp32 for a while: where differences matter that lower precision has no room for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

LOWER = (torch.float16, torch.bfloat16)


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """While it lasts, parameters and buffers of lower precision are in fp32."""
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
