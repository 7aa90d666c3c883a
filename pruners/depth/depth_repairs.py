"""What makes up for blocks that are dropped whole: a registry of plain functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.depth.laco import summed_differences
from secateur.pruners.depth.merge_targets import Run, point_block, runs_of
from secateur.pruners.depth.mka import fused, neighbour_similarities
from secateur.pruners.depth.streamline import Fitting, replacements
from secateur.pruners.models.anatomy import Anatomy
from secateur.spaces.names import nearest

Inherit = Callable[
    [Anatomy, Sequence[Run], Int[Tensor, "windows length"], Fitting], dict[int, dict[str, Tensor]]
]


def nothing(
    anatomy: Anatomy, runs: Sequence[Run], tokens: Int[Tensor, "windows length"], fitting: Fitting
) -> dict[int, dict[str, Tensor]]:
    """No repair: the blocks that stay are what they were."""
    return {}


def merged(
    anatomy: Anatomy, runs: Sequence[Run], tokens: Int[Tensor, "windows length"], fitting: Fitting
) -> dict[int, dict[str, Tensor]]:
    """See `laco.summed_differences`."""
    return {run.heir: summed_differences(anatomy, run) for run in runs}


def fused_by_similarity(
    anatomy: Anatomy, runs: Sequence[Run], tokens: Int[Tensor, "windows length"], fitting: Fitting
) -> dict[int, dict[str, Tensor]]:
    """See `mka.fused`."""
    similarities = neighbour_similarities(anatomy, tokens)
    return {run.heir: fused(anatomy, run, similarities) for run in runs}


def replaced(
    anatomy: Anatomy, runs: Sequence[Run], tokens: Int[Tensor, "windows length"], fitting: Fitting
) -> dict[int, dict[str, Tensor]]:
    """See `streamline.replacements`."""
    return replacements(anatomy, runs, tokens, fitting)


@dataclass(frozen=True)
class DepthRepairRow:
    """A row of the registry.

    Args:
        function: from the dense model and the runs that are dropped to the parameters of each heir, by its index.
        data: it needs calibration data.
        trains: it trains by gradients; then `Fitting` says how long.
        summary: one line for people.
        paper: address.
    """

    function: Inherit
    data: bool
    trains: bool
    summary: str
    paper: str


DEPTH_REPAIRS: dict[str, DepthRepairRow] = {
    "none": DepthRepairRow(nothing, False, False, "what stays is as it was", ""),
    "laco": DepthRepairRow(
        merged,
        False,
        False,
        "the block before takes over the sum of their differences to it",
        "https://arxiv.org/abs/2402.11187",
    ),
    "mka": DepthRepairRow(
        fused_by_similarity,
        True,
        False,
        "the block before is averaged with them by similarity",
        "https://arxiv.org/abs/2406.16330",
    ),
    "streamline": DepthRepairRow(
        replaced,
        True,
        True,
        "the block before is trained to give what they gave",
        "https://arxiv.org/abs/2403.19135",
    ),
}


def inherited(
    anatomy: Anatomy,
    dropped: Sequence[int],
    repair: str,
    tokens: Int[Tensor, "windows length"],
    fitting: Fitting | None = None,
) -> dict[int, dict[str, Tensor]]:
    """New parameters of blocks that stay, once some are dropped; the live model is left as it is.

    What an heir gets depends on its run alone, whatever else is dropped: all data is that of the dense model.

    Args:
        anatomy: the dense model.
        dropped: blocks that go whole.
        repair: a row of `DEPTH_REPAIRS`.
        tokens: calibration windows of at least two tokens.
        fitting: of a repair that trains; None: the default.

    Returns:
        For each heir its parameters by their names within the block (see `heirs.block_tensors`).

    Raises:
        ValueError: on an unknown name, blocks that can't be dropped, or as the repair does.
    """
    check_depth_repair(repair)
    runs = runs_of(dropped, len(anatomy.blocks))
    if not runs:
        return {}
    return DEPTH_REPAIRS[repair].function(anatomy, runs, tokens, fitting or Fitting())


def repair_depth(
    anatomy: Anatomy,
    dropped: Sequence[int],
    repair: str,
    tokens: Int[Tensor, "windows length"],
    fitting: Fitting | None = None,
) -> frozenset[int]:
    """Give the live, still dense model what `inherited` says: parameters point to new tensors, none is written to.

    The dropped blocks are still to be removed.

    Args:
        anatomy, dropped, repair, tokens, fitting: see `inherited`.

    Returns:
        The blocks whose weights changed.
    """
    found = inherited(anatomy, dropped, repair, tokens, fitting)
    for index, tensors in found.items():
        point_block(anatomy.blocks[index], tensors)
    return frozenset(found)


def check_depth_repair(repair: str) -> None:
    """Raise a ValueError unless the registry has it."""
    if repair not in DEPTH_REPAIRS:
        raise ValueError(
            f"Expected a known `repair`, got {repair!r}.{nearest(repair, DEPTH_REPAIRS)} "
            "List them with `secateur list methods`."
        )
