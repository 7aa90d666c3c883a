"""Blocks of a mapped model in the dtype that they compute in, one at a time, the next one read beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.models.anatomy import Block

_PAGE_BYTES = 4096


class HeldBlocks:
    """Contexts of single blocks: weights in a precision, and afterwards the mapped ones again.

    While a block is held, a thread reads the next one from its file, and converts it: at no time are more than two
    blocks held.

    Args:
        blocks: in order.
        precision: dtype to compute in.
    """

    def __init__(self, blocks: Sequence[Block], precision: torch.dtype) -> None:
        self._blocks, self._precision = blocks, precision
        self._ahead: _Reading | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldBlocks:
        return HeldBlocks(copy.deepcopy(self._blocks, memo), self._precision)

    @contextmanager
    def __call__(self, block: Block) -> Iterator[None]:
        mapped = [(parameter, parameter.data) for parameter in block.module.parameters()]
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.index != block.index:
            ahead = _Reading(block.index, [data for _, data in mapped], self._precision)
        read = ahead.result()
        del ahead
        following = self._blocks[block.index + 1 : block.index + 2]
        for other in following:
            weights = [parameter.data for parameter in other.module.parameters()]
            self._ahead = _Reading(other.index, weights, self._precision)
        try:
            for (parameter, _), data in zip(mapped, read, strict=True):
                parameter.data = data
            del read
            yield
        finally:
            for parameter, data in mapped:
                parameter.data = data


class _Reading(Thread):
    """Thread that reads and converts the weights of one block."""

    def __init__(self, index: int, weights: Sequence[Tensor], precision: torch.dtype) -> None:
        super().__init__(daemon=True)
        self.index, self._weights, self._precision = index, weights, precision
        self._read: list[Tensor] = []
        self.start()

    def run(self) -> None:
        for data in self._weights:
            self._read.append(in_precision(data, self._precision))
            if data.is_contiguous():  # one number of each page
                data.view(-1)[:: _PAGE_BYTES // data.element_size()].sum()

    def result(self) -> list[Tensor]:
        """The weights, once they are read."""
        self.join()
        return self._read


def in_precision(data: Tensor, precision: torch.dtype) -> Tensor:
    """The weights in a precision; whole numbers stay as they are."""
    return data.to(precision) if data.is_floating_point() else data
