"""Export capability: whether a format can carry all models of a space, checked before a search."""

from __future__ import annotations

from typing import Any

from secateur.pruners.export.registry import ANY, check_format
from secateur.pruners.export.stock import (
    stock_channels,
    stock_groups,
    stock_hidden,
    stock_queries,
    takes_biases,
)
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import text_config
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.stream_axes import stream_axes
from secateur.spaces.architecture.levels import default_step
from secateur.spaces.methods import UNIT_REPAIRS

PARENT_CLASS = ("hf-stock", "hf-padded")
"""Carry shapes and biases of the parent's class."""


_FOLLOWS = "their number follows the hidden width"


def check_carries(space: Any, config: Any) -> None:
    """Raise a ValueError, which names the settings that work, if no export could carry the architectures of a space.

    What a model's config tells alone; `check_capability` needs the model.
    """
    check_format(config.model_type, space.target_format)
    free = not space.all_alike and space.rules.units != {"blocks"}
    if free and _is_nested(config) and space.target_format in (ANY, "hf"):
        raise ValueError(
            f"Expected a model of text alone for blocks with shapes of their own, got {config.model_type}, whose "
            f"language tower is a part. Set `space.target_format` to hf-stock (all kept blocks alike) or hf-padded "
            f"(dense shapes with zeros: a study of quality), or `space.units` to [blocks]."
        )


def check_capability(space: Any, anatomy: Anatomy) -> None:
    """Raise a ValueError, which names the settings that work, unless an export can carry every architecture."""
    check_carries(space, anatomy.model.config)
    if _only_stock(space, anatomy) and "channels" in space.rules.units and not stock_channels(anatomy):
        mixed = any(block.mixture for block in anatomy.blocks)
        beside, why = (" beside whole experts", "both have one width") if mixed else ("", _FOLLOWS)
        raise ValueError(
            f"Expected a stock class that holds fewer channels of MLPs{beside} for channels in `units`, got "
            f"{anatomy.family}, in which {why}. Leave channels out, or set `space.target_format` to hf."
        )
    biased = [name for name in space.repairs if UNIT_REPAIRS[name].gives in ("bias", "both")]
    if biased and space.target_format in PARENT_CLASS and not takes_biases(anatomy):
        others = ", ".join(name for name, row in UNIT_REPAIRS.items() if row.gives in ("nothing", "weight"))
        raise ValueError(
            f"Expected a `space.repair` that adds no bias, as the stock class of {anatomy.family} has no place for "
            f"one, got {biased[0]}. Choose among {others}, or another `space.target_format`."
        )


def stock_kv_groups(space: Any, anatomy: Anatomy) -> tuple[int, ...] | None:
    """Numbers of KV groups that blocks which are all alike may keep; None: any."""
    return stock_groups(anatomy) if _only_stock(space, anatomy) else None


def stock_query_heads(space: Any, anatomy: Anatomy) -> tuple[tuple[int, int], ...] | None:
    """Likewise pairs of KV groups and query heads of each, where these are cut."""
    cuts = "heads" in space.rules.units if _only_stock(space, anatomy) else False
    return stock_queries(anatomy) if cuts else None


def stock_widths(space: Any, anatomy: Anatomy) -> dict[int, tuple[tuple[int, int], ...]]:
    """Numbers of hidden channels from which a search chooses, each with the heads that a stock class holds beside it.

    Steps of about a 12th of all down to half of them, or half of them alone where the inner width of recurrent mixers
    is given as a whole multiple of theirs; none where hidden channels are not cut.

    Raises:
        ValueError: if the model can't lose hidden channels, or no stock class holds fewer.
    """
    units = space.rules.units
    if "hidden" not in units:
        return {}
    stream_axes(anatomy)
    step = default_step(anatomy.width, 1, 12)
    attentions = [x.attention for x in find_layouts(anatomy, experts=True) if x.attention]
    cuts = any(not x.rigid for x in attentions)
    groups, queries = cuts and "groups" in units, cuts and "heads" in units
    half = anatomy.width // 2
    for widths in (range(anatomy.width - step, half - 1, -step), (half,)):
        pairs = {width: stock_hidden(anatomy, width, groups=groups, queries=queries) for width in widths}
        held = {width: heads for width, heads in pairs.items() if heads}
        if held:
            break
    if not held:
        raise ValueError(
            f"Expected a stock class that holds fewer hidden channels for hidden in `units`, got {anatomy.family}, "
            f"in which the width of heads follows theirs. Name other units."
        )
    return held


def _only_stock(space: Any, anatomy: Anatomy) -> bool:
    """True if blocks are all alike, and a stock class must hold them."""
    if not getattr(space, "all_alike", False):
        return False
    return space.target_format == "hf-stock" or (
        space.target_format == ANY and _is_nested(anatomy.model.config)
    )


def _is_nested(config: Any) -> bool:
    """True if the language tower is a part of the model."""
    return text_config(config) is not config
