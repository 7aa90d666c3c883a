"""Hidden states of a walk, kept on the disk between blocks, from which a killed walk goes on."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.stores.block_files import load_tensors, save_tensors

SMALL_BYTES = 1 << 26
"""States of so many bytes are written behind every block."""

LEAST_SHARE = 4
"""Larger ones once the walk has taken so many times as long as writing them did: behind every block on a CPU."""


class KeptStates:
    """Hidden states behind the last finished blocks, in one file, which the next ones replace.

    Args:
        directory: of the file.
        identity: of all that the states depend on, in one text; a file of another is not used.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self._directory, self._identity = directory, identity
        self._since, self._cost = time.monotonic(), 0.0

    def before(self, missing: Collection[int]) -> tuple[int, list[Tensor]] | None:
        """Number of finished blocks and the states behind them, mapped, if they lead to all missing blocks."""
        for path in self._paths():
            n_blocks = int(path.stem.rpartition("-")[2])
            states = load_tensors(path, self._identity) if n_blocks <= min(missing, default=0) else None
            if states:
                return n_blocks, [states[str(i)] for i in range(len(states))]
        return None

    def keep(
        self, n_blocks: int, hidden: Sequence[Float[Tensor, "_ length width"]]
    ) -> Sequence[Float[Tensor, "_ length width"]]:
        """Write the states behind so many blocks; the states to go on with, which are mapped on a CPU.

        Raises:
            LevelStoreError: if they can't be written.
        """
        started = time.monotonic()
        if sum(x.nbytes for x in hidden) > SMALL_BYTES and started - self._since < LEAST_SHARE * self._cost:
            return hidden
        path = self._directory / f"states-{n_blocks:04d}.safetensors"
        save_tensors(path, {str(i): x for i, x in enumerate(hidden)}, self._identity)
        for other in self._paths():
            if other != path:
                other.unlink()
        self._since = time.monotonic()
        self._cost = self._since - started
        if hidden[0].device.type != "cpu":
            return hidden
        kept = load_tensors(path, self._identity)
        assert kept is not None, "written just now"
        return [kept[str(i)] for i in range(len(hidden))]

    def remove(self) -> None:
        """Delete the file: the walk is done."""
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob("states-*.safetensors"))


def states_bytes(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> int:
    """Disk that `KeptStates` take at most: the states before a block, and those behind it."""
    return 2 * tokens.numel() * anatomy.width * anatomy.dtype.itemsize
