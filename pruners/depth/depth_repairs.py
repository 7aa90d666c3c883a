"""Repairs of the kept block before each run of dropped ones."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.depth.merge_targets import Fitting, Run, point_block, runs_of
from secateur.pruners.models.anatomy import Anatomy
from secateur.spaces.methods import DEPTH_REPAIRS
from secateur.spaces.names import nearest


def nothing(
    anatomy: Anatomy, runs: Sequence[Run], tokens: Int[Tensor, "windows length"], fitting: Fitting
) -> dict[int, dict[str, Tensor]]:
    """No repair: the kept blocks are as they were."""
    return {}


def inherited(
    anatomy: Anatomy,
    dropped: Sequence[int],
    repair: str,
    tokens: Int[Tensor, "windows length"],
    fitting: Fitting | None = None,
) -> dict[int, dict[str, Tensor]]:
    """New parameters of kept blocks, once others are dropped; the live model is left as it is.

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
    found: dict[int, dict[str, Tensor]] = DEPTH_REPAIRS[repair].function(
        anatomy, runs, tokens, fitting or Fitting()
    )
    return found


def repair_depth(
    anatomy: Anatomy,
    dropped: Sequence[int],
    repair: str,
    tokens: Int[Tensor, "windows length"],
    fitting: Fitting | None = None,
) -> frozenset[int]:
    """Point parameters of the live, still dense model to those of `inherited`; no tensor is written to.

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
    """Raise a ValueError unless there is such a repair."""
    if repair not in DEPTH_REPAIRS:
        raise ValueError(
            f"Expected a known `repair`, got {repair!r}.{nearest(repair, DEPTH_REPAIRS)} "
            "List them with `secateur list methods`."
        )
