"""The form that a stock class loads, with a plain config: for blocks of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from secateur.pruners.export.cut import CutModel
from secateur.pruners.models.anatomy import Anatomy, Heads
from secateur.pruners.models.discover import text_config
from secateur.pruners.models.narrow import Narrow
from secateur.spaces.architecture.candidate import Kept

# What families call the number of channels, and the switches for biases in either sub-layer.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
BIASES = ("attention_bias", "mlp_bias")


class NotStockError(ValueError):
    """No stock class and config have this shape; one line that says why."""


def stock_model(cut: CutModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A stock config's content and the weights for it, if the family has a config of this shape.

    Tried by building the stock model without memory and comparing its shapes with the weights, so that the family's
    validators and all sizes that its class computes count.

    Raises:
        NotStockError: if it hasn't.
    """
    if not cut.alike:
        raise NotStockError("the blocks that stay don't have one shape")
    content = cut.base_config()
    inner = cut.text_part(content)
    block = cut.with_heads
    kept, width = cut.kept[block.index], width_name(inner)
    if kept.kv_groups not in (0, block.attention_units) or kept.queries or cut.narrow:
        inner |= cut.shape(block.index) | cut.head_dim
    for index in cut.kept_blocks:
        if cut.anatomy.blocks[index].mixture is not None:
            inner |= cut.ffn_shape(index, cut.kept[index].ffn)
            continue
        if not cut.anatomy.blocks[index].ffn_width:
            continue
        if width is None:
            raise NotStockError("its config has no number of channels")
        inner[width] = cut.kept[index].ffn
    return fit(cut, content, cut.weights())


def width_name(content: Mapping[str, Any]) -> str | None:
    """Name of the number of channels in a config's content."""
    return next((name for name in WIDTHS if name in content), None)


def stock_groups(anatomy: Anatomy) -> tuple[int, ...]:
    """Numbers of KV groups, descending, that the family's stock class takes, if all blocks have as many.

    Configs without a width of heads compute it from their number, and validators refuse some numbers.
    """
    return tuple(n for n in range(_heads(anatomy).n_kv, 0, -1) if _is_stock(anatomy, n, 0))


def stock_queries(anatomy: Anatomy) -> tuple[tuple[int, int], ...]:
    """Likewise pairs of KV groups and query heads of each, fewer than all."""
    heads = _heads(anatomy)
    pairs = product(range(heads.n_kv, 0, -1), range(heads.n_queries // max(heads.n_kv, 1) - 1, 0, -1))
    return tuple(pair for pair in pairs if _is_stock(anatomy, *pair))


def stock_hidden(anatomy: Anatomy, width: int, *, groups: bool, queries: bool) -> tuple[tuple[int, int], ...]:
    """Pairs of KV groups and query heads of each (0: all) that the stock class takes with so many hidden channels.

    Args:
        groups, queries: whether there may be fewer than all of them.
    """
    n_groups = _heads(anatomy).n_kv
    per_group = _heads(anatomy).n_queries // max(n_groups, 1)
    pairs = product(
        range(n_groups, 0 if groups else n_groups - 1, -1),
        (0, *range(per_group - 1, 0, -1)) if queries else (0,),
    )
    return tuple(pair for pair in pairs if _is_stock(anatomy, *pair, width))


def _heads(anatomy: Anatomy) -> Heads:
    """Heads of the first block with some."""
    return next((block.heads for block in anatomy.blocks if block.n_heads), anatomy.blocks[0].heads)


def stock_channels(anatomy: Anatomy) -> bool:
    """True if the stock class takes MLPs of fewer channels, also where other blocks have mixtures."""
    plain = [block.ffn_width > 0 for block in anatomy.blocks]
    if not any(plain):
        return True
    if not any(block.mixture for block in anatomy.blocks):
        return width_name(text_config(anatomy.model.config).to_dict()) is not None
    kept = [
        x.whole._replace(ffn=x.ffn_width - 1) if alone else x.whole
        for x, alone in zip(anatomy.blocks, plain, strict=True)
    ]
    with suppress(NotStockError):
        stock_model(CutModel(anatomy, kept, planned=True))
        return True
    return False


def _is_stock(anatomy: Anatomy, n_groups: int, queries: int, hidden: int = 0) -> bool:
    kept = [
        Kept(n_groups, block.ffn_units, queries) if block.n_heads else block.whole for block in anatomy.blocks
    ]
    narrow = Narrow(tuple(range(hidden)), {}) if hidden else None
    with suppress(NotStockError):
        stock_model(CutModel(anatomy, kept, planned=True, narrow=narrow))
        return True
    return False


def takes_biases(anatomy: Anatomy) -> bool:
    """True if the family's stock class has a place for a bias in every output projection, see `fit`."""
    content = anatomy.model.config.to_dict()  # type: ignore[union-attr, operator]  # a transformers config
    inner = CutModel(anatomy, [block.whole for block in anatomy.blocks]).text_part(content)
    inner |= {name: True for name in BIASES if name in inner}
    with torch.device("meta"):
        skeleton: Any = type(anatomy.model)(type(anatomy.model.config)(**content))
    known = {name for name, _ in skeleton.named_parameters()}
    return all(f"{x.name}.bias" in known for x in anatomy.linears if x.is_output and x.expert is None)


def fit(
    cut: CutModel, content: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config's content and the weights, if a model of the family's class with this config has their shapes.

    Biases that a repair added are switched on in the config where the family can; those that come along are zeros.

    Raises:
        NotStockError: if it hasn't.
    """
    added = cut.added_biases()
    if added:
        inner = cut.text_part(content)
        inner |= {name: True for name in BIASES if name in inner}
    try:
        config = type(cut.config)(**content)
        skeleton = cut.skeleton(config)
    except (ValueError, StrictDataclassError) as error:  # the family's validators
        raise NotStockError(" ".join(str(error).split())) from error
    wanted = dict(skeleton.named_parameters())
    dtype = next(iter(weights.values())).dtype
    zeros = {
        name: torch.zeros(parameter.shape, dtype=dtype)
        for name, parameter in wanted.items()
        if added and name.endswith(".bias") and name not in weights
    }
    weights = weights | zeros
    for name, parameter in wanted.items():
        if name not in weights or weights[name].shape != parameter.shape:
            raise NotStockError(f"{type(skeleton).__name__} has another shape of {name}")
    extra = weights.keys() - wanted.keys() - {name for name, _ in skeleton.named_buffers()}
    if extra:
        raise NotStockError(f"{type(skeleton).__name__} has no {min(extra)}")
    return config.to_dict() | {"architectures": [type(skeleton).__name__]}, weights
