"""What the parts of each block weigh, counted on the live model: what exact costs of architectures are made from."""

from __future__ import annotations

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.lay_out import lay_out
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.models.shape import BlockShape as Counts
from secateur.pruners.models.shape import describe
from secateur.spaces.shape import BlockShape


def block_shapes(anatomy: Anatomy, context: int, stored_bytes: int) -> tuple[BlockShape, ...]:
    """The shapes of all blocks.

    Args:
        anatomy: the dense model.
        context: tokens that a token attends to, itself included, when multiply-accumulates are counted.
        stored_bytes: of one number, as stored.

    Raises:
        ValueError: if the model can't be cut, see `lay_out`.
    """
    counts = describe(anatomy).blocks
    layouts = lay_out(anatomy)
    return tuple(_shape(*pair, context, stored_bytes) for pair in zip(layouts, counts, strict=True))


def _shape(layout: BlockLayout, counts: Counts, context: int, stored_bytes: int) -> BlockShape:
    attention, mlp = layout.attention, layout.mlp
    heads = attention.heads_per_group * attention.head_dim  # width of a group's queries
    return BlockShape(
        n_kv_groups=attention.n_units,
        group_params=attention.unit_params,
        attention_params=attention.fixed_params,
        ffn_width=mlp.n_units,
        channel_params=mlp.unit_params,
        mlp_params=mlp.fixed_params,
        group_macs=_unit_weights(attention) + 2 * heads * counts.attended(context),  # scores, weighted sum
        channel_macs=_unit_weights(mlp),
        group_kv_bytes=2 * attention.head_dim * stored_bytes,
        attention_bias=_bias_to_come(attention),
        mlp_bias=_bias_to_come(mlp),
    )


def _bias_to_come(layout: SublayerLayout) -> int:
    """Parameters of a bias of the output projection, if it has none."""
    return layout.output.out_features if layout.output.bias is None else 0


def _unit_weights(layout: SublayerLayout) -> int:
    """Entries of the weight matrices that belong to one unit; biases are not multiplied."""
    return sum(placement.linear.n_weights for placement in layout.placements) // layout.n_units
