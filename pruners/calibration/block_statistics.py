"""Statistics of some blocks of the dense model, in the files that `CalibrationStatistics` reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.collected import VERSION, collected_by_walks, gram_bytes, packed_statistics
from secateur.pruners.calibration.kept_states import KeptStates, states_bytes
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.stores.block_files import Key, build_store


@dataclass(frozen=True)
class StatisticsKey(Key):
    """Identity of the statistics of one pass over the windows.

    Args:
        made: version of the collectors.
        model: identity of the model and its precision.
        tokens: hash of the windows.
        shape: number of the windows, and their length.
        gram: whether Gram matrices are among them.
    """

    made: int
    model: str
    tokens: str
    shape: tuple[int, ...]
    gram: bool


def build_block_statistics(
    directory: Path,
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    model: str,
    *,
    gram: bool,
    only: Collection[int],
    on_block: Callable[[int], None],
) -> None:
    """Write the statistics of these blocks, one file each, equal to those of `walk_dense`.

    Args:
        directory: made if it is missing; what a killed process left there is continued.
        anatomy: the dense model.
        tokens: calibration windows.
        model: its identity, in one text.
        gram: Gram matrices of inputs, too.
        only: indices of the blocks.
        on_block: told the index of each block that is done, or passed.

    Raises:
        LevelStoreError: if there is no room on the disk.
    """
    key = StatisticsKey(VERSION, model, tokens_sha256(tokens), tuple(tokens.shape), gram)
    kept = KeptStates(directory, key.digest)

    def make(missing: Collection[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        walk = stream_blocks(anatomy, tokens, **collected_by_walks(gram), missing=missing, kept=kept)
        for part in walk:
            index = part.block.index
            yield index, packed_statistics(part) if index in missing else {}

    def room(missing: Collection[int]) -> int:
        matrices = gram_bytes(anatomy, missing) if gram else 0
        return matrices + (states_bytes(anatomy, tokens) if missing else 0)

    build_store(
        directory,
        key,
        len(anatomy.blocks),
        room,
        make,
        otherwise="lower the samples of the calibration set",
        on_block=on_block,
        only=only,
    )
