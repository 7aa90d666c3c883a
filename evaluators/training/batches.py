"""Which windows a step is trained on: a function of the seed and the step alone, so that nothing is to be kept."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor


class Batches:
    """An endless sequence of windows in batches: each epoch is all windows once, in an order of its own.

    Args:
        windows: token ids.
        batch: windows a step.
        seed: of the orders.
    """

    def __init__(self, windows: Int[Tensor, "windows length"], batch: int, seed: int) -> None:
        self._windows = windows
        self._batch = batch
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __getitem__(self, step: int) -> Int[Tensor, "batch length"]:
        """The windows of a step, counted from 0; a batch may reach over the end of an epoch."""
        places = (divmod(i, len(self._windows)) for i in range(step * self._batch, (step + 1) * self._batch))
        return self._windows[[int(self._order(epoch)[place]) for epoch, place in places]]

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._windows))
