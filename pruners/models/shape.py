"""Sizes of a live model as plain numbers, for spaces and exact costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, MixtureLayout, SublayerLayout
from secateur.pruners.models.mixture import Mixture
from secateur.pruners.models.narrow import Narrow, narrowed
from secateur.spaces.latency import LatencyTable
from secateur.spaces.shape import BlockShape, ExpertShape, ModelShape, NarrowShape, Prunable


def prunables(anatomy: Anatomy) -> list[Prunable]:
    """The prunable projections, block by block."""
    return [Prunable(x.name, x.block, x.sublayer, x.n_weights) for x in anatomy.linears]


def model_shape(
    anatomy: Anatomy,
    context: int,
    stored_bytes: int,
    *,
    blocks: bool = True,
    latency: LatencyTable | None = None,
    held: Mapping[str, Any] = MappingProxyType({}),
) -> ModelShape:
    """The sizes of a model; zeros count as weights, a tied weight once as parameters.

    Multiply-accumulates are those of linear layers, and in attention of the scores and the weighted sum of values;
    not of norms, softmax, activations, rotary embeddings.

    Args:
        context: tokens that a token attends to, itself included, when multiply-accumulates are counted.
        stored_bytes: of one number, as stored; the KV cache is held in it too.
        blocks: count the parts of blocks, too.
        latency: see `ModelShape`.
        held: its fields ``held_``, and ``widths``, numbers of hidden channels with the heads that go with each.

    Raises:
        ValueError: if blocks are asked for and the model can't be cut, see `find_layouts`.
    """
    held = dict(held)
    widths = held.pop("widths", {})
    attention = sum(mixer.score_macs * x.attended(context) for x in anatomy.blocks for mixer in x.mixers)
    inside = sum(linear.n_weights for linear in anatomy.linears if linear.expert is None)
    routed = sum(_macs_of_experts(block.mixture) for block in anatomy.blocks if block.mixture)
    shape = ModelShape(
        n_params=sum(parameter.numel() for parameter in anatomy.model.parameters()),
        bytes_per_param=stored_bytes,
        macs_per_token=inside + routed + fixed_macs(anatomy) + attention,
        kv_bytes_per_token=sum(mixer.cache_width for x in anatomy.blocks for mixer in x.mixers)
        * stored_bytes,
        blocks=block_shapes(anatomy, context, stored_bytes) if blocks else (),
        latency=latency,
        **held,
    )
    return replace(shape, narrower=tuple(narrow_shape(anatomy, shape, *item) for item in widths.items()))


def fixed_macs(anatomy: Anatomy) -> int:
    """Multiply-accumulates a token of linear layers outside of the blocks: the head, tied or not, and the like."""
    inside = set(anatomy.container.modules())
    outside = (module for module in anatomy.model.modules() if module not in inside)
    return sum(module.weight.numel() for module in outside if isinstance(module, nn.Linear))


def block_shapes(anatomy: Anatomy, context: int, stored_bytes: int) -> tuple[BlockShape, ...]:
    """The shapes of all blocks, see `model_shape`."""
    layouts = find_layouts(anatomy, experts=True)
    return tuple(_block_shape(layout, context, stored_bytes) for layout in layouts)


_NO_ATTENTION: Mapping[str, Any] = MappingProxyType({"rigid": True})
_NO_MLP: Mapping[str, Any] = MappingProxyType({"rigid_ffn": True})


def _block_shape(layout: BlockLayout, context: int, stored_bytes: int) -> BlockShape:
    of_attention = (
        _of_attention(layout, layout.attention, context, stored_bytes) if layout.attention else _NO_ATTENTION
    )
    of_mlp = _of_mlp(layout.mlp) if layout.mlp else _NO_MLP
    return BlockShape(**of_attention, **of_mlp, shared_params=layout.shared_params)


def _of_attention(
    layout: BlockLayout, attention: SublayerLayout, context: int, stored_bytes: int
) -> dict[str, Any]:
    """Fields of a block's shape that are of what mixes tokens."""
    mixer = layout.block.mixer("attention") or next(x for x in layout.block.mixers if x.kind == "recurrent")
    scores = mixer.score_macs * layout.block.attended(context)
    further = {*attention.further}
    fixed = [x for x in layout.block.linears if x.module in further]
    found = {
        "n_kv_groups": attention.n_units,
        "group_params": attention.unit_params,
        "attention_params": attention.fixed_params,
        "group_macs": _unit_weights(attention) + scores // attention.n_units,
        "group_kv_bytes": mixer.cache_width // attention.n_units * stored_bytes,
        "attention_bias": _bias_to_come(attention),
        "attention_macs": sum(x.n_weights for x in fixed),
        "rigid": attention.rigid,
    }
    if not attention.splits:
        return found
    n_queries = attention.heads_per_group
    query_macs = attention.query_weights + scores // (attention.n_units * n_queries)
    return found | {
        "n_queries": n_queries,
        "query_params": attention.query_params,
        "query_macs": query_macs,
    }


def _of_mlp(mlp: SublayerLayout | MixtureLayout) -> dict[str, Any]:
    """Likewise of an MLP or a mixture."""
    found = {"ffn_width": mlp.n_units, "channel_params": mlp.unit_params, "mlp_params": mlp.fixed_params}
    if isinstance(mlp, MixtureLayout):
        return found | {"channel_macs": _expert_macs(mlp.mixture), "experts": _expert_shape(mlp)}
    return found | {
        "channel_macs": _unit_weights(mlp),
        "mlp_bias": _bias_to_come(mlp),
        "rigid_ffn": mlp.rigid,
    }


def narrow_shape(
    anatomy: Anatomy, shape: ModelShape, width: int, held: tuple[tuple[int, int], ...] = ()
) -> NarrowShape:
    """Sizes with fewer hidden channels: those of the same parts with narrower parameters.

    Args:
        shape: of the dense model, with its blocks.
        held: see `NarrowShape`.
    """
    layouts = find_layouts(anatomy, experts=True)

    def sizes() -> tuple[ModelShape, list[BlockShape]]:
        return model_shape(anatomy, 1, 1, blocks=False), [_block_shape(layout, 1, 1) for layout in layouts]

    dense, whole = sizes()
    with narrowed(anatomy, Narrow(tuple(range(width)), {}), planned=True):
        narrow, blocks = sizes()
    return NarrowShape(
        width,
        narrow.n_params,
        shape.macs_per_token + narrow.macs_per_token - dense.macs_per_token,
        tuple(
            replace(
                new,
                group_macs=known.group_macs + new.group_macs - old.group_macs,
                query_macs=known.query_macs + new.query_macs - old.query_macs,
                group_kv_bytes=known.group_kv_bytes,
            )
            for known, old, new in zip(shape.blocks, whole, blocks, strict=True)
        ),
        held,
    )


def _expert_shape(layout: MixtureLayout) -> ExpertShape:
    mixture = layout.mixture
    shared = [x for x in layout.modules if isinstance(x, nn.Linear)]
    routed = set(mixture.experts.modules())
    return ExpertShape(
        top_k=mixture.top_k,
        fewest=mixture.fewest,
        multiple=mixture.n_groups,
        router_macs=mixture.router.shape[1],
        shared_macs=sum(
            x.weight.numel() for x in shared if x not in routed and x.weight is not mixture.entries[0].owned
        ),
        channels=mixture.n_channels,
        channel_params=layout.routed[0].unit_params,
        channel_macs=_unit_weights(layout.routed[0]),
        **({} if layout.shared is None else _of_shared(layout.shared)),
    )


def _of_shared(layout: SublayerLayout) -> dict[str, int]:
    return {
        "shared": layout.n_units,
        "shared_params": layout.unit_params,
        "shared_channel_macs": _unit_weights(layout),
        "shared_bias": _bias_to_come(layout),
    }


def _expert_macs(mixture: Mixture) -> int:
    return sum(p.numel() for p in mixture.experts[0].parameters() if p.ndim > 1)


def _macs_of_experts(mixture: Mixture) -> int:
    """Multiply-accumulates a token of the router and of the experts that it is routed to."""
    return mixture.router.numel() + mixture.top_k * _expert_macs(mixture)


def _bias_to_come(layout: SublayerLayout) -> int:
    """Parameters of a bias of the output projection, if it has none."""
    return layout.output.out_features if layout.output.bias is None else 0


def _unit_weights(layout: SublayerLayout) -> int:
    """Entries of the weight matrices that belong to one unit; biases are not multiplied."""
    return sum(placement.linear.n_weights for placement in layout.placements) // layout.n_units
