"""Architectures as candidates: their text, their exact cost, and where a search starts."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.search.files import checked
from secateur.spaces.architecture.candidate import Architecture, Kept
from secateur.spaces.latency import Phase
from secateur.spaces.shape import ModelShape, NarrowShape
from tests.architectures import (
    BLOCK,
    EVERYTHING,
    FFN,
    GROUPS,
    HEAD,
    QUERIES,
    SPLIT,
    TABLE,
    WIDTH,
    WINDOW,
    build,
    shape_of,
    split_shape,
)

# --- text ---


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=20),
    st.sampled_from(["", "none", "bias", "refit", "obs"]),
)
def test_text_is_read_back(blocks, repair):
    architecture = Architecture(tuple(Kept(*block) for block in blocks), repair)
    assert Architecture.parse(architecture.text) == architecture


def test_text_is_compact():
    blocks = (Kept(3, 1536),) * 5 + (Kept(0, 1024), Kept(3, 0))
    assert Architecture(blocks, "refit").text == "architecture:3/1536x5,0/1024,3/0;repair=refit"
    assert Architecture((Kept(3, 1536, 2),) * 2).text == "architecture:3q2/1536x2"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "architecture:1/2,1/2",
            "architecture:1/2x1",
            "architecture:01/2",
            "architecture:1",
            "architecture:1/2,",
            "architecture:3q0/2",
            "architecture:3q/2",
            "architecture:q1/2",
        ),
        *(
            "architecture:1/2;repair=",
            "architecture:1/2;repair=magic",
            "architecture:1/2x0",
            "architecture:1/2\n",
        ),
        *("allocation:1", "architecture:1/-2", "architecture: 1/2"),
    ],
)
def test_only_the_canonical_text_is_accepted(text):
    with pytest.raises(ValueError, match="Expected an architecture such as"):
        Architecture.parse(text)


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        ({}, "architecture:3/1536x7", "Expected 8 blocks, got 7"),
        ({}, "architecture:3/1536x7,3/100", "got 3/100 at block 7"),
        ({}, "architecture:0/1536,3/1536x7", "got 0/1536 at block 0"),
        ({}, "architecture:3/1536x8;repair=none", "got 'none'"),
        ({"repair": ["none", "obs"]}, "architecture:3/1536x8", "got ''"),
        ({"units": ["blocks"], "target": 0.5}, "architecture:3/1536x7,0/1536", "that `units` can make"),
        ({"tied": True}, "architecture:3/1536x7,3/1024", "each dropped or with the same one of"),
        ({"tied": True}, "architecture:0/0,3/1536x7", "each dropped or with the same one of"),
    ],
    ids=str,
)
def test_architectures_of_other_spaces_are_refused(settings, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**settings).parse(text)


# --- costs ---


def slow_count(blocks, width: int = WIDTH) -> dict[str, float]:
    """Parameters, multiply-accumulates and cache from the shapes of what is left, matrix by matrix."""
    params, macs, cached = 50_000 * width, 49_152 * width, 0
    for kv_groups, ffn, of_group, *_ in blocks:
        queries = kv_groups * (of_group or QUERIES) * HEAD
        attention = [(queries, width), *[(kv_groups * HEAD, width)] * 2, (width, queries)]
        matrices = [*attention, (ffn, width), (ffn, width), (width, ffn)]
        n_weights = sum(rows * columns for rows, columns in matrices)
        params += n_weights + width * (kv_groups > 0) + width * (ffn > 0)
        macs += n_weights + 2 * queries * WINDOW
        cached += 2 * kv_groups * HEAD * 2
    return {"params": params, "macs": macs, "kv_bytes": cached, "size_bytes": 2 * params}


@pytest.mark.parametrize(
    "settings",
    [
        {"units": EVERYTHING},
        {"tied": True, "target": 0.4},
        {"units": ["heads", "groups", "channels", "attention", "mlp"]},
        {"units": ["heads", "channels", "blocks"], "tied": True},
    ],
    ids=str,
)
def test_cost_counts_exactly(settings):
    shape = split_shape(8) if "heads" in settings.get("units", ()) else None
    space, rng = build(shape=shape, **settings), np.random.default_rng(0)
    dense = space.baselines()["dense"]
    for candidate in [dense, *(space.sample(rng, 0) for _ in range(50))]:
        cost = space.cost(candidate)
        assert {name: cost[name] for name in ("params", "macs", "kv_bytes", "size_bytes")} == slow_count(
            candidate.blocks
        )
        removed = space.cost(dense)["params"] - cost["params"]
        assert cost["sparsity"] == removed / (8 * BLOCK.params(GROUPS, FFN))


def test_latency_is_predicted_from_the_table():
    space = build(2, target=0.5)
    cost = space.cost(Architecture((Kept(2, 512), Kept(0, 1536))))
    assert cost["latency_prefill"] == pytest.approx(4.0 + 1.4 + (0.9 + 2.1) / 2 + 0.0 + 4.0)
    assert cost["latency_decode"] == pytest.approx(1.0 + 0.3 + (0.3 + 0.4 * 256 / 1280) + 0.0 + 0.7)
    assert "latency_decode" not in build(2, shape_of(2, None), target=0.5).cost(
        Architecture((Kept(3, 1536),) * 2)
    )


def test_tied_forms_meet_a_measured_latency_as_near_as_they_come():
    """Groups save next to nothing, a step of the channels half of the latency: the target lies between."""
    decode = Phase(0.0, (0.0, 0.001, 0.002, 0.003), ((0, 0.0), (768, 0.5), (1536, 1.0)))
    shape = shape_of(4, replace(TABLE, phases={"prefill": decode, "decode": decode}))
    form = {
        "shape": shape,
        "of": "latency_decode",
        "tied": True,
        "units": ["groups", "channels"],
        "ffn_step": 768,
    }
    space = build(**form, target=0.48)
    found = space.sample(np.random.default_rng(0), 0)
    assert {block.ffn for block in found.blocks} == {768}
    with pytest.raises(ValueError, match=r"The nearest is 0\.4985"):
        build(**form, target=0.45)
    with pytest.raises(ValueError, match="The nearest is"):
        build(**form | {"of": "params"}, target=0.62)


@given(st.lists(st.floats(0, 10), min_size=3, max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_smaller_sub_layers_never_count_as_slower(times, first, second):
    phase = Phase(0.0, tuple(times), tuple((20 * i, ms) for i, ms in enumerate(times)))
    small, large = sorted((min(first, 20 * (len(times) - 1)), min(second, 20 * (len(times) - 1))))
    assert phase.mlp(small) <= phase.mlp(large)
    assert phase.attention(small // 20) <= phase.attention(large // 20)
    assert phase.mlp(20 * (len(times) - 1)) == times[-1]


def test_shapes_are_read_back_from_files_old_ones_too():
    shape = shape_of(3)
    assert checked(json.dumps(shape.to_json()), ModelShape, "a shape") == shape
    old = {"n_params": 10, "bytes_per_param": 2, "macs_per_token": 3, "kv_bytes_per_token": 4}
    assert checked(json.dumps(old), ModelShape, "a shape") == ModelShape(**old)
    assert checked(json.dumps(ModelShape(**old).to_json()), ModelShape, "a shape") == ModelShape(**old)


# --- starting points ---


def test_uniform_removes_the_same_share_everywhere():
    space = build(30)
    uniform = space.baselines()["uniform@0.25"]
    assert sum(kept.ffn != 1152 for kept in uniform.blocks) <= 1  # what groups can't make up for
    assert {kept.kv_groups for kept in uniform.blocks} == {2, 3}
    assert np.mean([kept.kv_groups for kept in uniform.blocks]) == pytest.approx(0.75 * 3, abs=0.1)
    halves = [sum(kept.kv_groups for kept in uniform.blocks[half]) for half in (slice(15), slice(15, 30))]
    assert abs(halves[0] - halves[1]) <= 1
    assert space.config(uniform)["blocks"][1] == uniform.blocks[1].plain


def test_uniform_without_levels_drops_evenly():
    gone = [
        i
        for i, kept in enumerate(build(30, units=["blocks"], target=0.2).baselines()["uniform@0.2"].blocks)
        if not kept[0]
    ]
    assert len(gone) == 6
    assert set(np.diff(gone)) <= {4, 5, 6}


def test_uniform_of_tied_blocks_keeps_as_many_as_it_can():
    (kept,) = set(build(30, tied=True).baselines()["uniform@0.25"].blocks)
    assert kept == Kept(2, 1184)
    blocks = (
        build(30, tied=True, units=["channels", "blocks"], target=0.85, ffn_step=512)
        .baselines()["uniform@0.85"]
        .blocks
    )
    assert 0 < blocks.count(Kept(0, 0)) < 29


# --- query heads ---


def test_query_heads_are_cut_beside_groups_at_the_exact_cost():
    space = build(shape=split_shape(4), units=["heads", "groups", "channels"])
    rng = np.random.default_rng(0)
    found = [space.sample(rng, 0) for _ in range(60)]
    attentions = {(kept.kv_groups, kept.queries) for each in found for kept in each.blocks}
    assert attentions >= {(3, 0), (3, 2), (3, 1), (2, 0), (2, 2), (1, 0)}
    for each in found:
        assert space.parse(each.text) == each
        assert space.target_of(space.mutate(each, rng)) == 0
        assert space.cost(each)["kv_bytes"] == sum(kept.kv_groups for kept in each.blocks) * 2 * HEAD * 2
    slot = next(i for i, name in enumerate(space.slots) if name == "block1.attention")
    usages = [space.usage(slot, option) for option in space.options(slot)]
    assert usages == sorted(usages), "ascending"
    assert usages[1] == 3 * 2 * HEAD * WIDTH, "one query head of each group"


def test_query_heads_that_save_nothing_are_no_levels():
    space = build(shape=split_shape(4), units=["heads", "groups"], of="kv_bytes")
    assert {kept.queries for kept in space.sample(np.random.default_rng(0), 0).blocks} == {0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": shape_of(4, None)}, "got one each. Use groups"),
        ({"shape": split_shape(4), "of": "latency_decode"}, "latency tables have no times of them"),
        ({"shape": replace(split_shape(4), latency=TABLE)}, "tables have no times of them"),
    ],
    ids=["one query a group", "target", "objective"],
)
def test_query_heads_are_refused_where_they_don_t_work(settings, message):
    with pytest.raises(ValueError, match=message):
        build(units=["heads", "channels"], **settings)


def test_tied_query_heads_are_those_that_the_stock_class_holds():
    shape = replace(split_shape(8), held_groups=(3,), held_queries=((3, 2),))
    space = build(shape=shape, units=["heads", "channels"], tied=True)
    rng = np.random.default_rng(0)
    assert {space.sample(rng, 0).blocks[0].queries for _ in range(50)} == {0, 2}
    assert {each.name for each in space.parameters()} == {"ffn", "queries"}


# --- hidden width ---


def narrow_shape(n_blocks: int = 8) -> ModelShape:
    """SmolLM2's sizes, which can be 512 or 448 wide, with some numbers of heads."""
    shape = split_shape(n_blocks)

    def at(width: int) -> NarrowShape:
        part = {
            name: value * width // WIDTH
            for name, value in vars(SPLIT).items()
            if name in ("group_params", "channel_params", "attention_params", "mlp_params", "query_params")
        }
        macs = 2 * (QUERIES + 1) * HEAD * width + 2 * QUERIES * HEAD * WINDOW
        block = replace(
            SPLIT, **part, group_macs=macs, channel_macs=3 * width, query_macs=2 * HEAD * (width + WINDOW)
        )
        blocks = (block,) * n_blocks
        n_params = 50_000 * width + n_blocks * block.params(GROUPS, FFN)
        n_macs = 49_152 * width + n_blocks * block.macs(GROUPS, FFN)
        return NarrowShape(width, n_params, n_macs, blocks, ((3, 0), (2, 0), (1, 0), (3, 2)))

    return replace(shape, narrower=(at(512), at(448)))


def test_one_hidden_width_is_searched_at_the_exact_cost():
    space = build(shape=narrow_shape(), units=["groups", "heads", "channels", "hidden"], tied=True)
    rng = np.random.default_rng(0)
    found = [space.sample(rng, 0) for _ in range(200)]
    assert {each.hidden for each in found} == {0, 512, 448}
    for each in found:
        cost, width = space.cost(each), each.hidden or WIDTH
        counted = slow_count(each.blocks, width)
        assert {name: cost[name] for name in counted} == counted
        assert space.parse(each.text) == each == space.from_parameters(space.to_parameters(each), 0, rng)
        assert space.target_of(space.mutate(each, rng)) == 0
        head = each.blocks[0].kv_groups, each.blocks[0].queries
        assert not each.hidden or head in ((3, 0), (2, 0), (1, 0), (3, 2)), "what the stock class holds"
    assert space.uniform(0).hidden == 0
    narrow = next(each for each in found if each.hidden == 512)
    assert space.config(narrow)["hidden"] == 512
    assert narrow.text.endswith(";hidden=512")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": split_shape(4), "tied": True}, "whose stock class holds fewer hidden channels"),
        ({"shape": narrow_shape()}, "one width serves all"),
        ({"shape": narrow_shape(), "tied": True, "share_of": "model"}, "take from the embedding too"),
        ({"shape": narrow_shape(), "tied": True, "target_format": "hf-padded"}, "any, hf or hf-stock"),
        ({"shape": replace(narrow_shape(), latency=TABLE), "tied": True}, "no latencies with hidden"),
    ],
    ids=["no such class", "free", "share", "format", "latency"],
)
def test_a_hidden_width_is_refused_where_it_does_not_work(settings, message):
    with pytest.raises(ValueError, match=message):
        build(units=["hidden", "channels"], **settings)


def test_free_spaces_have_all_hidden_channels():
    with pytest.raises(ValueError, match="all hidden channels unless blocks are alike, got 512"):
        build().parse("architecture:3/1536x8;hidden=512")
