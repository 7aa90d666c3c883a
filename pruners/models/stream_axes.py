"""Axes of the residual stream in the parameters of a model, and its class with fewer hidden channels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.models.discover import text_config

EMBEDDED = ("word_embed_proj_dim",)
"""Names in configs of the width of embeddings, beside that of the stream (OPT)."""

EXPANSIONS = ("expand", "mamba_expand")
"""Names in configs of the inner width of recurrent mixers as a multiple of the hidden one."""

READERS = ("gate", "up", "gate_up", "q", "k", "v", "qkv")
"""Roles of projections that read the stream, but for those of latent attention."""

Shapes = Mapping[str, torch.Size]


def stream_norms(anatomy: Anatomy) -> dict[str, nn.Module]:
    """Norms of the residual stream by their full names, the final one last.

    Raises:
        ValueError: if fewer hidden channels are not possible in this model, in one line.
    """
    _check(anatomy)
    modules = dict(anatomy.model.named_modules())
    blocks = {block.name for block in anatomy.blocks}
    inside = {linear.name.rpartition(".")[0] for linear in anatomy.linears} - blocks
    names = [name for block in anatomy.blocks for name in block.norms]
    found = [name for name in names if not any(name.startswith(f"{owner}.") for owner in inside)]
    return {name: modules[name] for name in (*found, anatomy.final_norm)}


def _check(anatomy: Anatomy) -> None:
    names = {module: name for name, module in anatomy.model.named_modules()}
    outside = [x for x in names.values() if not x.startswith(f"{names[anatomy.container]}.")]
    if text_config(anatomy.model.config) is not anatomy.model.config:
        raise _refusal(anatomy, "another tower, which writes into the stream of the language tower")
    if not anatomy.final_norm:
        raise _refusal(anatomy, "no norm behind the last block")
    if isinstance(anatomy.tail, nn.Sequential) and len(anatomy.tail) > 1:
        raise _refusal(anatomy, "more than a norm between blocks and head")
    if anatomy.embedding.embedding_dim != anatomy.width:
        raise _refusal(anatomy, "an embedding of another width")
    if any("norm" in name.rpartition(".")[2] for name in outside if name != anatomy.final_norm):
        raise _refusal(anatomy, "a norm behind the embedding")
    if any(block.unknown for block in anatomy.blocks):
        raise _refusal(anatomy, "matrices that are not understood")


def _refusal(anatomy: Anatomy, reason: str) -> ValueError:
    return ValueError(
        f"Expected blocks between an embedding and a norm, each reading and writing one stream of hidden channels, for "
        f"fewer of these, got a model ({anatomy.family}) with {reason}."
    )


def stream_axes(anatomy: Anatomy) -> dict[str, int]:
    """Axis of the residual stream in each parameter that has one, by the parameter's name.

    Of plain projections their roles tell it. What recurrent mixers, latent attentions and routers read is told by the
    family's class with another hidden width: the axis of the stream is the one that has another size there.

    Raises:
        ValueError: if the inner width of a mixer follows the hidden one, if the model has parameters that are not
            understood, and as `stream_norms`.
    """
    norms = stream_norms(anatomy)
    names = {module: name for name, module in anatomy.model.named_modules()}
    axes = {f"{name}.{own}": 0 for name in norms for own in ("weight", "bias")}
    latent = {x.name for block in anatomy.blocks if block.heads.kv_rows for x in block.linears}
    plain, others = dict[str, Linear](), dict[str, Linear]()
    for linear in anatomy.linears:
        told = linear.role in READERS and not (linear.sublayer == "attention" and linear.name in latent)
        (plain if told or linear.is_output else others)[linear.name] = linear
    for linear in plain.values():
        axes[f"{linear.name}.weight"] = int(not linear.is_output) ^ int(linear.transposed)
        if linear.is_output:
            axes[f"{linear.name}.bias"] = 0
    axes[f"{names[anatomy.head]}.weight"] = 1
    inside = set(anatomy.container.modules())
    for module, name in names.items():
        if isinstance(module, nn.Embedding) and module not in inside:
            axes[f"{name}.weight"] = 1
    parameters = dict(anatomy.model.named_parameters())
    found = {name: axis for name, axis in axes.items() if name in parameters}
    rowwise = {*plain, names[anatomy.head]} | {name for block in anatomy.blocks for name in block.norms}
    asked = [x for x in parameters if x not in axes and x.rpartition(".")[0] not in rowwise]
    asked = [x for x in asked if parameters[x].numel() > 1]
    return found | (_by_class(anatomy, asked, others) if asked else {})


def _by_class(anatomy: Anatomy, asked: list[str], linears: Mapping[str, Linear]) -> dict[str, int]:
    """Axes of these parameters, by comparison with the family's class of half as many hidden channels.

    Args:
        anatomy: of the model.
        asked: names of parameters.
        linears: projections among their owners, by name.
    """
    other = class_shapes(anatomy, width_fields(anatomy, anatomy.width // 2))
    if other is None:
        raise _refusal(anatomy, "a class that takes no other width")
    if not _same_inside(anatomy, other):
        raise _refusal(anatomy, "mixers whose inner width follows the hidden width")
    found = {}
    for name in asked:
        shape, narrow = anatomy.model.get_parameter(name).shape, other.get(name)
        if narrow is None or len(narrow) != len(shape):
            raise _refusal(anatomy, f"parameters that are not understood: {name}")
        changed = [axis for axis, size in enumerate(shape) if size != narrow[axis]]
        linear = linears.get(name.rpartition(".")[0])
        read = int(not linear.transposed) if linear else 1
        if changed and (changed != [read] or len(shape) != 2):
            raise _refusal(anatomy, f"parameters that are not understood: {name}")
        if changed:
            found[name] = read
    return found


def _same_inside(anatomy: Anatomy, shapes: Shapes) -> bool:
    """True if the output projections of all mixers of other projections than q, k, v and o are as wide inside."""
    mixers = [x for block in anatomy.blocks for x in block.mixers if any(y.role == "in" for y in x.linears)]
    outputs = [x for mixer in mixers for x in mixer.linears if x.is_output]
    return all(shapes[f"{x.name}.weight"][int(not x.transposed)] == x.in_features for x in outputs)


def width_fields(anatomy: Anatomy, width: int) -> dict[str, Any]:
    """Entries of the config for so many hidden channels, with recurrent mixers as wide inside as they were.

    Where a config gives their inner width as a multiple of the hidden one, in whole numbers, few widths are left.
    """
    config: Any = anatomy.model.config
    content = config.to_dict()
    names = (config.attribute_map.get("hidden_size", "hidden_size"), *EMBEDDED)
    fields = {name: width for name in names if content.get(name) == anatomy.width}
    multiples = {name: content[name] for name in EXPANSIONS if content.get(name)}
    if not multiples:
        return fields
    wider = {name: value * anatomy.width / width for name, value in multiples.items()}
    ways = (fields, fields | {name: int(x) if x == int(x) else x for name, x in wider.items()})
    for way in ways:
        shapes = class_shapes(anatomy, way)
        if shapes is not None and _same_inside(anatomy, shapes):
            return way
    return fields


def class_shapes(anatomy: Anatomy, fields: Mapping[str, Any]) -> Shapes | None:
    """Shapes of the parameters of the model's class with these entries of its config; None if it refuses them."""
    config: Any = anatomy.model.config
    with suppress(ValueError, StrictDataclassError), torch.device("meta"):
        model: Any = type(anatomy.model)
        made = model(type(config)(**config.to_dict() | fields))
        return {name: parameter.shape for name, parameter in made.named_parameters()}
    return None
