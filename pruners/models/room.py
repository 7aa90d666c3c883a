"""Room of a device beside a model's weights, and the sizes of work and caches that it allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from secateur.pruners.models.memory import total_bytes

MOST_CHUNK_TOKENS = 4096
MOST_BATCH_TOKENS = 8192
LOGIT_BYTES = 32
"""Memory of one logit in the work of a loss: the model's, two copies in float32, probabilities of both sides."""


@dataclass(frozen=True)
class Room:
    """Memory of a device beside the weights of a model.

    It is counted from the whole device, or a worker's share of it, so that it does not change while a search runs:
    equal sizes of chunks and batches give equal losses. What is kept in the room does not change results.

    Args:
        n_bytes: of the device, less the weights.
    """

    n_bytes: int

    @property
    def levels(self) -> int:
        """Most bytes of levels that stay on the device."""
        return self.n_bytes // 2

    @property
    def states(self) -> int:
        """Most bytes of outputs of blocks that candidates share."""
        return self.n_bytes // 8

    @property
    def probabilities(self) -> int:
        """Most bytes of the dense model's probabilities that are kept."""
        return self.n_bytes // 8

    @property
    def changed(self) -> int:
        """Most bytes of changed blocks that are kept for the next candidate."""
        return self.n_bytes // 16

    def chunk_tokens(self, vocab_size: int, least: int) -> int:
        """Positions whose logits are computed at a time, a power of two times `least`."""
        return _fitting(self.n_bytes // 16, LOGIT_BYTES * vocab_size, least, MOST_CHUNK_TOKENS)

    def batch_tokens(self, token_bytes: int, least: int) -> int:
        """Tokens that a block computes at a time, a power of two times `least`.

        Args:
            token_bytes: activations of one token in a block.
            least: whatever the room.
        """
        return _fitting(self.n_bytes // 16, token_bytes, least, MOST_BATCH_TOKENS)


def _fitting(n_bytes: int, each: int, least: int, most: int) -> int:
    found = least
    while 2 * found <= most and 2 * found * each <= n_bytes:
        found *= 2
    return found


def room_beside(model: nn.Module, device: torch.device, n_bytes: int | None = None) -> Room | None:
    """Room beside a model's weights on its device; None on a CPU, and where it is not known.

    Args:
        n_bytes: of a device that is only thought of; None: as the device says.
    """
    total = total_bytes(device) if n_bytes is None or device.type == "cpu" else n_bytes
    if total is None:
        return None
    weights = (*model.parameters(), *model.buffers())
    return Room(max(0, total - sum(x.nbytes for x in weights if x.device == device or x.is_meta)))
