"""Settings of the space `masks`, and its construction from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.spaces.architecture.cost import ShareOf, block_shares
from secateur.spaces.masks.space import MaskSpace, Variation
from secateur.spaces.methods import CUT_REPAIRS
from secateur.spaces.section import one_of
from secateur.spaces.shape import ModelShape, Prunable
from secateur.spaces.space_settings import SpaceSettings, Target, targets_of


class MaskSettings(SpaceSettings):
    """Settings of the space `masks`: which KV groups and FFN channels each block keeps.

    Args:
        target: share of the blocks' `of` to remove; one value, a list, or a range.
        share_of: what `target` is a share of: the ``blocks``, or the whole ``model``.
        of: quantity of the target.
        channels: neighbouring channels that are kept or removed together, a divisor of the FFN width; None: about a
            48th of it.
        importance: ranking of groups and channels for the first masks.
        mutation: probability that a mutation draws the mask of a sub-layer anew.
        similarity: least share of its units that a new mask keeps.
        repair: compensation for removed weights in exports with sequential statistics; candidates are measured without.
        dampening: share of the mean diagonal added to Gram matrices.
        statistics: of exported models: ``sequential`` (repaired, behind pruned blocks) or ``dense`` (as measured).
    """

    kind: Literal["masks"] = "masks"
    target: Target = 0.2
    of: Literal["params", "macs"] = "params"
    share_of: ShareOf = "blocks"
    channels: int | None = Field(default=None, ge=1)
    importance: str = "wanda_sp"
    mutation: float = Field(default=0.2, ge=0, le=1)
    similarity: float = Field(default=0.8, ge=0, le=1)
    repair: Annotated[str, one_of(lambda: CUT_REPAIRS)] = "admm"
    dampening: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    statistics: Literal["sequential", "dense"] = "sequential"

    changeable: ClassVar[tuple[str, ...]] = ("target", "share_of", "statistics", "repair")
    """Keys that may change when a search is continued: no measurement depends on them."""

    @property
    def method_names(self) -> tuple[str, ...]:
        return (self.importance,)

    @property
    def export_statistics(self) -> str:
        return self.statistics

    @property
    def targets(self) -> tuple[float, ...]:
        return targets_of(self.target)


def build_masks(settings: MaskSettings, linears: Sequence[Prunable], shape: ModelShape) -> MaskSpace:
    """The space of these settings, for a model of this shape.

    Raises:
        ValueError: if the settings don't fit the model, or a target can't be met.
    """
    variation = Variation(settings.mutation, settings.similarity)
    targets = block_shares(shape, settings.targets, settings.share_of, settings.of)
    return MaskSpace(shape, settings.channels, targets, settings.of, variation).asked_as(settings.targets)
