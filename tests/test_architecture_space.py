from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from secateur.search.controller import Trial
from secateur.search.controllers.registry import CONTROLLERS
from secateur.spaces.architecture.candidate import Architecture, Kept
from secateur.spaces.architecture.levels import default_step
from secateur.spaces.architecture.settings import ArchitectureSettings, build_architecture
from secateur.spaces.architecture.space import ArchitectureSpace
from secateur.spaces.cost import BlockShape, ModelShape
from secateur.spaces.latency import LatencyTable, Phase
from secateur.spaces.measurement import Fidelity, Measurement

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


def build(n_blocks: int = 8, shape: ModelShape | None = None, **settings):
    return build_architecture(ArchitectureSettings(**settings), (), shape or shape_of(n_blocks))


# --- text ---


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=20),
    st.sampled_from(["", "none", "bias", "refit", "obs"]),
)
def test_text_is_read_back(blocks, repair):
    architecture = Architecture(tuple(Kept(*block) for block in blocks), repair)
    assert Architecture.parse(architecture.text) == architecture


def test_text_is_compact():
    blocks = (Kept(3, 1536),) * 5 + (Kept(0, 1024), Kept(3, 0))
    assert Architecture(blocks, "refit").text == "architecture:3/1536x5,0/1024,3/0;repair=refit"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "architecture:1/2,1/2",
            "architecture:1/2x1",
            "architecture:01/2",
            "architecture:1",
            "architecture:1/2,",
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
        ({"tied": True}, "architecture:3/1536x7,3/1024", "all keep one of"),
        ({"tied": True}, "architecture:0/0,3/1536x7", "all keep one of"),
    ],
    ids=str,
)
def test_architectures_of_other_spaces_are_refused(settings, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**settings).parse(text)


# --- costs ---


def slow_count(blocks) -> dict[str, float]:
    """Parameters, multiply-accumulates and cache from the shapes of what is left, matrix by matrix."""
    params, macs, cached = 50_000 * WIDTH, 49_152 * WIDTH, 0
    for kv_groups, ffn in blocks:
        queries = kv_groups * QUERIES * HEAD
        attention = [(queries, WIDTH), *[(kv_groups * HEAD, WIDTH)] * 2, (WIDTH, queries)]
        matrices = [*attention, (ffn, WIDTH), (ffn, WIDTH), (WIDTH, ffn)]
        n_weights = sum(rows * columns for rows, columns in matrices)
        params += n_weights + WIDTH * (kv_groups > 0) + WIDTH * (ffn > 0)
        macs += n_weights + 2 * queries * WINDOW
        cached += 2 * kv_groups * HEAD * 2
    return {"params": params, "macs": macs, "kv_bytes": cached, "size_bytes": 2 * params}


@pytest.mark.parametrize("settings", [{"units": EVERYTHING}, {"tied": True, "target": 0.4}], ids=str)
def test_cost_counts_exactly(settings):
    space, rng = build(**settings), np.random.default_rng(0)
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


@given(st.lists(st.floats(0, 10), min_size=3, max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_smaller_sub_layers_never_count_as_slower(times, first, second):
    phase = Phase(0.0, tuple(times), tuple((20 * i, ms) for i, ms in enumerate(times)))
    small, large = sorted((min(first, 20 * (len(times) - 1)), min(second, 20 * (len(times) - 1))))
    assert phase.mlp(small) <= phase.mlp(large)
    assert phase.attention(small // 20) <= phase.attention(large // 20)
    assert phase.mlp(20 * (len(times) - 1)) == times[-1]


def test_shapes_are_read_back_from_files_old_ones_too():
    shape = shape_of(3)
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
    old = {"n_params": 10, "bytes_per_param": 2, "macs_per_token": 3, "kv_bytes_per_token": 4}
    assert ModelShape.from_json(old) == ModelShape(**old)
    assert ModelShape.from_json(json.loads(json.dumps(ModelShape(**old).to_json()))) == ModelShape(**old)


# --- variation ---

CASES = [
    {"target": [0.15, 0.4]},
    {"target": [0.2, 0.5], "units": EVERYTHING, "repair": ["none", "refit", "obs"], "protect": [2]},
    {"target": 0.5, "units": ["attention", "mlp", "blocks"]},
    {"target": [0.3, 0.6], "of": "latency_decode", "target_format": "gguf", "multiple_of": 64},
    {"target": [0.25, 0.5], "target_format": "hf-stock", "repair": ["none", "bias"], "protect": [7]},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_budgets_hold_under_thousands_of_variations(settings):
    space, rng = build(**settings), np.random.default_rng(0)
    tied = not isinstance(space, ArchitectureSpace)
    n_budgets = len(space.budgets)
    parents = [space.sample(rng, budget) for budget in range(n_budgets)]
    n_same = 0
    for turn in range(500):
        budget = turn % n_budgets
        parent, other = parents[budget], parents[turn // 7 % n_budgets]
        text = parent.text
        children = [space.mutate(parent, rng), space.crossover(parent, other, rng)]
        children.append(space.repair(children[0], (budget + 1) % n_budgets, rng))
        children.append(space.repair(children[2], budget, rng))
        assert [space.budget_of(child) for child in children] == [
            budget,
            budget,
            (budget + 1) % n_budgets,
            budget,
        ]
        for child in children:
            assert child.blocks[0].kv_groups
            if tied:
                assert len(set(child.blocks) - {Kept(0, 0)}) == 1
            if settings.get("target_format") == "gguf":
                assert min(kept.ffn for kept in child.blocks) >= 64
            if "multiple_of" in settings:
                assert not any(kept.ffn % settings["multiple_of"] for kept in child.blocks)
            for index in settings.get("protect", ()):
                assert child.blocks[index] != Kept(0, 0)
        n_same += children[0] == parent
        assert Architecture.parse(text).blocks == parent.blocks
        parents[budget] = children[int(rng.integers(2))]
    assert n_same == 0


def test_budgets_are_met_to_within_half_a_level_of_the_finest_slot():
    space = build(target=0.3)
    low, high = space.usage_bounds(0)
    total, level = 8 * BLOCK.params(GROUPS, FFN), 128 * BLOCK.channel_params + BLOCK.mlp_params
    assert abs(low + high - 2 * 0.3 * total) <= 2
    assert high - low + 1 == level


def test_any_architecture_can_be_reached():
    for settings in (
        {"units": ["groups", "attention", "mlp"], "target": 0.4},
        {"units": EVERYTHING, "ffn_step": 768},
    ):
        space, rng = build(3, **settings), np.random.default_rng(0)
        options = [space.options(slot) for slot in range(len(space.slots))]
        met = {c for c in map(space.assemble, itertools.product(*options)) if space.budget_of(c) == 0}
        reached = {space.baselines()["uniform@" + f"{space.budgets[0]:g}"]}
        for _ in range(40):
            reached |= {space.mutate(candidate, rng) for candidate in sorted(reached, key=lambda c: c.text)}
        assert reached == met


def test_attention_is_weighed_against_the_mlp():
    space, rng = build(), np.random.default_rng(0)
    candidate = space.baselines()["uniform@0.25"]
    groups = {sum(kept.kv_groups for kept in space.mutate(candidate, rng).blocks) for _ in range(200)}
    assert len(groups) > 3


def test_sub_layers_and_blocks_come_and_go():
    space, rng = build(units=EVERYTHING, target=0.4), np.random.default_rng(0)
    candidate, changes = space.sample(rng, 0), []
    for _ in range(300):
        child = space.mutate(candidate, rng)
        pairs = list(zip(candidate.blocks, child.blocks, strict=True))
        changes += [(a, b) for a, b in pairs if (a == (0, 0)) != (b == (0, 0)) or (0 in a) != (0 in b)]
        candidate = child
    assert {0 in a for a, _ in changes} == {True, False}
    assert any(b == (0, 0) and 0 not in a for a, b in changes)
    assert any(a == (0, 0) and 0 not in b for a, b in changes)


def test_repair_is_a_gene_where_several_are_offered():
    space, rng = build(repair=["none", "refit"]), np.random.default_rng(0)
    assert space.slots[-1] == "repair"
    parent = space.baselines()["uniform@0.25"]
    children = [space.mutate(parent, rng) for _ in range(200)]
    alone = [child for child in children if child.blocks == parent.blocks]
    assert 5 < len(alone) < 60
    assert {child.repair for child in alone} == {"refit"}
    assert space.config(alone[0])["repair"] == "refit"
    assert build(repair="obs").config(build(repair="obs").baselines()["dense"])["repair"] == "obs"


# --- starting points ---


def test_uniform_removes_the_same_share_everywhere():
    space = build(30)
    uniform = space.baselines()["uniform@0.25"]
    assert sum(kept.ffn != 1152 for kept in uniform.blocks) <= 1  # what groups can't make up for
    assert {kept.kv_groups for kept in uniform.blocks} == {2, 3}
    assert np.mean([kept.kv_groups for kept in uniform.blocks]) == pytest.approx(0.75 * 3, abs=0.1)
    halves = [sum(kept.kv_groups for kept in uniform.blocks[half]) for half in (slice(15), slice(15, 30))]
    assert abs(halves[0] - halves[1]) <= 1
    assert space.config(uniform)["blocks"][1] == uniform.blocks[1]._asdict()


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


# --- restrictions ---


def test_levels_are_named_for_those_who_make_them():
    space = build(3)
    assert space.levels[0].kv_groups == (3, 2, 1)
    assert space.levels[1].kv_groups == (3, 2, 1, 0)
    assert space.levels[1].ffn == tuple(range(1536, -1, -128))
    assert build(3, of="kv_bytes").levels[1].ffn == (1536,)  # channels don't count there
    assert build(3, target_format="gguf").levels[1].ffn[-2:] == (128, 32)
    assert build(3, target_format="gguf", multiple_of=48, ffn_step=96).levels[1].ffn[-2:] == (96, 48)
    assert build(3, units=["blocks"], target=0.5).levels[1].ffn == (1536, 0)
    assert build(3, protect=[1]).levels[1].ffn == (1536,)
    assert build(3, tied=True, ffn_step=512).levels[2].ffn == (1536, 1024, 512, 0)


@pytest.mark.parametrize(
    ("width", "multiple_of", "step"),
    [
        (1536, 1, 128),
        (11008, 1, 688),
        (14336, 256, 1024),
        (176, 1, 16),
        (1009, 1, 84),
        (8, 1, 1),
        (64, 32, 32),
    ],
)
def test_steps_are_about_a_twelfth_and_divide_the_width_where_they_can(width, multiple_of, step):
    assert default_step(width, multiple_of, 12) == step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target": 1.0},
            "Expected `target` from 0.0039 to 0.9896 (what attention, channels, groups, mlp can",
        ),
        ({"target": 0.5, "units": ["groups"]}, "Expected `target` from"),
        ({"target": 0.001}, "got 0.001. Choose another target"),
        ({"target": [0.3, 0.301]}, "Expected targets that the levels tell apart"),
        ({"target": 0.9, "tied": True, "units": ["channels"]}, "what blocks that are all alike can lose"),
        (
            {"multiple_of": 7},
            "Expected `multiple_of` to divide the FFN width, got 7 for 1536 channels at block 0. Use 6.",
        ),
        (
            {"ffn_step": 1536},
            "Expected `ffn_step` below the FFN width, got 1536 for 1536 channels at block 0. Use 128.",
        ),
        ({"protect": [8]}, "Expected `protect` to hold indices of blocks from 0 to 7, got 8"),
        ({"protect": list(range(8))}, "Expected `units` that can be removed and count in params"),
        ({"of": "kv_bytes", "units": ["mlp"]}, "count in kv_bytes, got mlp"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_model_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**settings)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="secateur latency MODEL"):
        build(shape=shape_of(8, None), of="latency_prefill")
    other = replace(BLOCK, ffn_width=1024)
    mixed = replace(shape_of(3, None), blocks=(BLOCK, other, BLOCK))
    assert build(shape=mixed).levels[1].ffn[0] == 1024
    with pytest.raises(ValueError, match=r"all alike for a tied architecture, got .* at block 1"):
        build(shape=mixed, tied=True)
    with pytest.raises(ValueError, match="got one for 3 and 1536 at block 1"):
        build(shape=replace(mixed, latency=TABLE))
    with pytest.raises(ValueError, match="blocks are counted"):
        build(shape=replace(shape_of(3), blocks=()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.5}, "Expected `target` within [0, 1], got 1.5"),
        ({"units": []}, "Expected `units` to name some"),
        ({"units": ["heads"]}, "units"),
        ({"units": ["channels", "blocks"]}, "Expected blocks in `units` alone or beside attention and mlp"),
        ({"units": ["mlp"], "tied": True}, "where all blocks are alike"),
        ({"units": ["attention"], "target_format": "hf-stock"}, "`target_format: hf-stock`"),
        ({"ffn_step": 0}, "Expected `ffn_step` >= 1, got 0"),
        ({"ffn_step": 100, "multiple_of": 32}, "Expected `multiple_of` to divide `ffn_step`, got 32 and 100"),
        ({"repair": []}, "Expected `repair` to name some"),
        ({"repair": ["none", "none"]}, "each once"),
        ({"damp": 0}, "Expected `damp` > 0, got 0"),
        ({"of": "joules"}, "of"),
        ({"target_format": "onnx"}, "target_format"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        ArchitectureSettings(**settings)


def test_candidates_without_a_budget_are_not_varied():
    for space in (build(), build(tied=True)):
        with pytest.raises(ValueError, match="meet a budget"):
            space.mutate(space.baselines()["dense"], np.random.default_rng(0))


# --- controllers run on it unchanged ---


def loss_of(candidate: Architecture) -> float:
    """Late attention and early channels are needed most."""
    blocks = enumerate(candidate.blocks)
    return sum((i + 1) * (3 - groups) / 3 + (7 - i) * (1 - ffn / FFN) ** 2 for i, (groups, ffn) in blocks)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("uniform", {}),
        ("random", {}),
        ("evolution", {"offspring": 6}),
        ("evolution", {"start": "sensitivity", "sensitivity": {"levels": [0.3]}, "offspring": 6}),
        ("sensitivity", {"levels": [0.5]}),
        ("greedy", {}),
        ("optuna", {"start": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "space", [{"repair": ["none", "obs"]}, {"units": EVERYTHING, "of": "macs"}, {"tied": True}], ids=str
)
def test_controllers_search_it(kind, settings, space):
    space = build(6, target=[0.25, 0.4], **space)
    row, fidelities = CONTROLLERS[kind], (Fidelity("search", 64), Fidelity("search", 256))
    needs_slots = kind in {"sensitivity", "greedy"} or settings.get("start") == "sensitivity"
    if needs_slots and not isinstance(space, ArchitectureSpace):
        with pytest.raises(ValueError, match="whose slots can be measured alone"):
            row.build(space, fidelities, 0, row.settings(kind=kind, **settings))
        return
    controller = row.build(space, fidelities, 0, row.settings(kind=kind, **settings))
    found = {}
    while len(found) < (30 if kind == "optuna" else 100) and (proposals := controller.ask(8)):
        for proposal in proposals:
            assert proposal.key not in found
            assert space.parse(proposal.key[0]) == proposal.candidate
            found[proposal.key] = proposal.candidate
            measured = Measurement(
                *proposal.key[:1], proposal.fidelity, {"loss": loss_of(proposal.candidate)}
            )
            controller.tell([Trial(len(found), measured)])
    final = [candidate for (_, fidelity), candidate in found.items() if fidelity == "search:256"]
    for budget in (0, 1):
        losses = [loss_of(candidate) for candidate in final if space.budget_of(candidate) == budget]
        assert losses
        if kind in {"evolution", "sensitivity"}:
            assert min(losses) < loss_of(list(space.baselines().values())[1 + budget])
