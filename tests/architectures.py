"""Spaces of architectures of a model that has SmolLM2's blocks."""

from __future__ import annotations

from dataclasses import replace

from secateur.spaces.architecture.settings import ArchitectureSettings, build_architecture
from secateur.spaces.latency import LatencyTable, Phase
from secateur.spaces.shape import BlockShape, ModelShape

# SmolLM2's sizes.
WIDTH, HEAD, QUERIES, GROUPS, FFN, WINDOW = 576, 64, 3, 3, 1536, 512
BLOCK = BlockShape(
    n_kv_groups=GROUPS,
    group_params=2 * (QUERIES + 1) * HEAD * WIDTH,
    attention_params=WIDTH,
    ffn_width=FFN,
    channel_params=3 * WIDTH,
    mlp_params=WIDTH,
    group_macs=2 * (QUERIES + 1) * HEAD * WIDTH + 2 * QUERIES * HEAD * WINDOW,
    channel_macs=3 * WIDTH,
    group_kv_bytes=2 * HEAD * 2,
)
SPLIT = replace(
    BLOCK,
    n_queries=QUERIES,
    query_params=2 * HEAD * WIDTH,
    query_macs=2 * HEAD * WIDTH + 2 * HEAD * WINDOW,
)
"""The same block, whose query heads can be cut singly."""
TABLE = LatencyTable(
    "made up",
    {
        "prefill": Phase(4.0, (0.0, 1.0, 1.4, 2.0), ((0, 0.0), (256, 0.9), (768, 2.1), (1536, 4.0))),
        "decode": Phase(1.0, (0.0, 0.3, 0.3, 0.4), ((0, 0.0), (256, 0.3), (1536, 0.7))),
    },
)
EVERYTHING = ["groups", "channels", "attention", "mlp", "blocks"]


def shape_of(n_blocks: int, latency: LatencyTable | None = TABLE) -> ModelShape:
    return ModelShape(
        n_params=50_000 * WIDTH + n_blocks * BLOCK.params(GROUPS, FFN),
        bytes_per_param=2,
        macs_per_token=49_152 * WIDTH + n_blocks * BLOCK.macs(GROUPS, FFN),
        kv_bytes_per_token=n_blocks * BLOCK.kv_bytes(GROUPS),
        blocks=(BLOCK,) * n_blocks,
        latency=latency,
    )


def split_shape(n_blocks: int) -> ModelShape:
    return replace(shape_of(n_blocks, None), blocks=(SPLIT,) * n_blocks)


def build(n_blocks: int = 8, shape: ModelShape | None = None, **settings):
    return build_architecture(ArchitectureSettings(**settings), (), shape or shape_of(n_blocks))
