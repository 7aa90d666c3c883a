"""Second moments of the inputs of chosen blocks: what output errors are computed from, mapped by each worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.pruners.calibration.stream import BlockStatistics
from secateur.spaces.whole_file import whole_file

Kind = Literal["full", "diagonal"]


@dataclass(frozen=True)
class Grams:
    """Which ones.

    Args:
        blocks: indices of the blocks.
        kind: whole matrices, or their diagonals.
    """

    blocks: tuple[int, ...]
    kind: Kind = "full"


def save_grams(directory: Path, part: BlockStatistics, kind: Kind, identity: str) -> None:
    """Write those of one block, per token, whole or not at all; projections with one input share one.

    Raises:
        OSError, SafetensorError: if the file can't be written.
    """
    owners = {id(inputs): name for name, inputs in reversed(part.inputs.items())}  # the first that reads it
    alias = {name: owners[id(inputs)] for name, inputs in part.inputs.items()}
    tensors = {}
    for owner in set(alias.values()):
        inputs = part.inputs[owner]
        moments = inputs.gram if kind == "full" else inputs.sum_squares
        assert moments is not None, "the caller streams with the full moments of this block"
        tensors[owner] = (moments / max(inputs.n_tokens, 1)).contiguous().cpu()
    with whole_file(_path(directory, part.block.index, kind)) as new:
        save_file(tensors, new, metadata={"identity": identity, "alias": json.dumps(alias)})


def load_grams(directory: Path, grams: Grams, identity: str) -> Mapping[str, Float[Tensor, "..."]] | None:
    """By the projection's full name ``in in``, or ``in`` if diagonal; None if not all of them are there.

    Args:
        directory: where `save_grams` wrote them.
        grams: which ones.
        identity: that they were saved under.
    """
    found: dict[str, Tensor] = {}
    for block in grams.blocks:
        try:
            with safe_open(_path(directory, block, grams.kind), framework="pt") as file:
                known = file.metadata() or {}
            if known.get("identity") != identity:
                return None
            tensors = load_file(_path(directory, block, grams.kind))
        except (OSError, SafetensorError):
            return None
        found |= {name: tensors[owner] for name, owner in json.loads(known["alias"]).items()}
    return found


def _path(directory: Path, block: int, kind: Kind) -> Path:
    return directory / f"grams-{kind}-{block:04d}.safetensors"
