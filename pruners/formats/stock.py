"""The form that a stock class loads, with a plain config: for blocks of one shape."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from secateur.pruners.formats.cut import CutModel
from secateur.pruners.formats.directory import base_config

# What families call the number of channels, and the switches for biases in either sub-layer.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
BIASES = ("attention_bias", "mlp_bias")


class NotStockError(ValueError):
    """No stock class and config have this shape; one line that says why."""


def stock_model(cut: CutModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A stock config's content and the weights for it, if the family has a config of this shape.

    Tried by building the stock model without memory and comparing its shapes with the weights: what a family's
    validator refuses, and what its class computes from other numbers than the config's, does not pass.

    Raises:
        NotStockError: if it hasn't.
    """
    shapes = {(cut.kept[index].kv_groups, cut.kept[index].ffn) for index in cut.stays}
    if len(shapes) > 1 or 0 in next(iter(shapes)):
        raise NotStockError("the blocks that stay don't have one shape")
    content = base_config(cut.config, cut.stays)
    block, kept = cut.anatomy.blocks[0], cut.kept[0]
    if kept.kv_groups != block.n_kv_heads:
        content |= cut.shape(0) | {"head_dim": block.head_dim}
    content[next(name for name in WIDTHS if name in content)] = kept.ffn
    return fit(cut, content, cut.weights())


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
        content = content | {name: True for name in BIASES if name in content}
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
