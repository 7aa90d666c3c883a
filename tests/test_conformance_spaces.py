"""What every space keeps to, run over the registry: a new row is tested by what is here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.spaces.latency import LatencyTable, Phase
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import BlockShape, ExpertShape, ModelShape, Prunable
from secateur.spaces.space import SeparableSpace, Space

SIZES = {"q": 96, "k": 32, "v": 32, "o": 96, "gate": 256, "up": 256, "down": 256}
LINEARS = tuple(
    Prunable(f"model.layers.{block}.{name}_proj", block, "attention" if name in "qkvo" else "mlp", 10 * size)
    for block in range(4)
    for name, size in SIZES.items()
)
PHASE = Phase(0.5, (0.0, 0.3, 0.5, 0.6, 0.8), ((0, 0.0), (16, 0.5), (48, 1.5)))
SHAPE = ModelShape(
    n_params=100_000,
    bytes_per_param=2,
    macs_per_token=90_000,
    kv_bytes_per_token=256,
    blocks=(BlockShape(4, 200, 20, 48, 30, 20, 220, 30, 16),) * 4,
    latency=LatencyTable("made up", {"prefill": PHASE, "decode": PHASE}),
)
BLOCK = replace(SHAPE.blocks[0], n_queries=3, query_params=40, query_macs=45)
SPLIT = replace(SHAPE, blocks=(BLOCK,) * 4, latency=None)
"""The same model, whose query heads can be cut singly."""

MIXED = replace(
    SHAPE,
    blocks=(
        *SHAPE.blocks[:1],
        *[BlockShape(4, 200, 20, 6, 900, 30, 220, 850, 16, experts=ExpertShape(2))] * 3,
    ),
    latency=None,
)

FOUND = {x.name: (0.9, 0.3, 0.55, 0.65)[x.block] for x in LINEARS}

# For each row of the registry the settings that it is tested with.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "allocation": [
        {},
        {"target": [0.3, 0.55], "granularity": "sublayer"},
        {"target": {"low": 0.2, "high": 0.4, "step": 0.1}, "protect": ["*.0.*"]},
        {"target": 0.61, "granularity": "block"},
        {"target": 0.6, "group_size": 4, "max_sparsity": 1.0},
        {"target": 0.6, "step": 0.025, "statistics": "expected", "found": FOUND},
        {"target": 0.0},
    ],
    "architecture": [
        {},
        {
            "target": [0.2, 0.5],
            "repair": ["none", "refit"],
            "units": ["groups", "channels", "attention", "mlp", "blocks"],
        },
        {
            "target": {"low": 0.2, "high": 0.6, "step": 0.2},
            "of": "latency_decode",
            "multiple_of": 8,
            "protect": [1],
        },
        {"target": 0.25, "of": "kv_bytes", "target_format": "gguf"},
        {"target": 0.5, "units": ["blocks"]},
        {"target": 0.3, "units": ["heads", "groups", "channels", "attention", "mlp"]},
        {"target": 0.3, "units": ["heads", "channels", "blocks"], "tied": True},
        {"target": [0.2, 0.5], "tied": True, "repair": ["none", "bias"]},
        {"target": 0.5, "target_format": "hf-stock", "units": ["blocks"]},
        {"target": 0.0},
        {"target": [0.2, 0.4], "units": ["experts"], "repair": ["none", "ream"]},
    ],
    "formula": [
        {},
        {"target": 0.7, "terminals": ["W", "X"], "known": ["magnitude"], "size": 12, "depth": 5},
    ],
    "masks": [
        {},
        {"target": [0.2, 0.5], "channels": 4, "mutation": 0.5, "similarity": 0.5},
        {"target": 0.3, "of": "macs", "channels": 1, "mutation": 0},
    ],
    "recipe": [
        {},
        {"target": [0.2, 0.5], "sources": {"a": "docs", "b": "x.txt"}, "gradients": ["backward", "forward"]},
        {"unit": "weights", "target": {"low": 0.4, "high": 0.6, "step": 0.1}, "known": "all"},
        {
            "unit": "weights",
            "metrics": ["blend", "sparsegpt", "formula: abs(W)"],
            "search": ["metric", "repair"],
        },
        {"unit": "blocks", "target": 0.25},
        {"unit": "experts", "target": [0.25, 0.5], "known": "all"},
        {"search": ["calibration"], "start": "llm_pruner_first", "choose": ["clusters"], "samples": [8]},
        {
            "schedule": {
                "step": [0.1, 1],
                "steps": [1, 4],
                "shape": ["linear", "cubic"],
                "retrain": [0, 4096],
                "after": [0, 8192],
                "loss": ["ce", "kl"],
                "lr": [0.0001, 0.001],
                "penalty": [0, 0.01],
            }
        },
        {"unit": "weights", "search": ["metric"], "schedule": {"steps": [1, 4, 16], "before": [0, 4096]}},
        {
            "unit": "weights",
            "target": [0.5, 0.75],
            "group_size": [0, 4, 8],
            "metrics": ["wanda", "dsnot", "sparsegpt"],
        },
        {
            "unit": "weights",
            "target": 0.5,
            "group_size": [4],
            "search": ["allocation"],
            "known": ["owl", "dsnot"],
        },
    ],
}
CASES = [(kind, settings) for kind in SPACES for settings in SETTINGS[kind]]


def build(case: tuple[str, dict[str, Any]]) -> Space[Any]:
    kind, settings = case
    row = SPACES[kind]
    mixed = "experts" in (settings.get("unit"), *settings.get("units", ()))
    shape = SPLIT if "heads" in settings.get("units", ()) else MIXED if mixed else SHAPE
    return row.build(row.settings(kind=kind, **settings), LINEARS, shape)


@pytest.fixture(params=CASES, ids=str)
def space(request: pytest.FixtureRequest) -> Space[Any]:
    return build(request.param)


def test_rows_are_described():
    for row in SPACES.values():
        assert row.summary
        assert row.source.startswith("https://")


def test_baselines_are_dense_and_one_to_compare_with_for_each_target(space):
    first, *names = list(space.baselines())
    assert first == "dense"
    n_targets = len(space.targets)
    assert [name.partition("@")[2] for name in names[:n_targets]] == [f"{b:.10g}" for b in space.targets]
    for target, name in enumerate(names[:n_targets]):
        assert space.target_of(space.baselines()[name]) == target
    for name in names[n_targets:]:  # plain, or likewise
        plain, _, share = name.partition("@")
        assert plain
        assert not share or f"{space.targets[space.target_of(space.baselines()[name])]:.10g}" == share
    if space.targets[0] > 0:
        assert space.target_of(space.baselines()["dense"]) is None


@given(case=st.sampled_from(CASES), seed=st.integers(0, 2**32 - 1))
def test_variation_stays_in_the_space_and_leaves_parents_alone(case, seed):
    space = build(case)
    rng = np.random.default_rng(seed)
    for target in range(len(space.targets)):
        first, second = space.sample(rng, target), space.sample(rng, len(space.targets) - 1)
        before = first.text, second.text, hash(first)
        children = [
            first,
            space.mutate(first, rng),
            space.mutate_after(first, rng.random(), rng),
            space.crossover(first, second, rng),
            space.repair(second, target, rng),
        ]
        assert (first.text, second.text, hash(first)) == before
        for child in children:
            assert space.target_of(child) == target
            assert space.parse(child.text) == child
            assert space.parse(child.text).text == child.text
            if isinstance(space, SeparableSpace):
                assert space.assemble(space.disassemble(child)) == child
        assert space.repair(first, target, rng) is first


@given(case=st.sampled_from(CASES), seed=st.integers(0, 2**32 - 1))
def test_the_same_generator_gives_the_same_candidates(case, seed):
    def course() -> list[str]:
        space, rng = build(case), np.random.default_rng(seed)
        first = space.sample(rng, 0)
        late = space.mutate_after(first, 0.6, rng)
        return [x.text for x in (first, late, space.mutate(first, rng), space.crossover(first, first, rng))]

    assert course() == course()


@given(
    case=st.sampled_from([("allocation", {}), ("architecture", {})]),
    depth=st.floats(0, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_late_mutations_leave_the_blocks_before_alone(case, depth, seed):
    space, rng = build(case), np.random.default_rng(seed)
    assert isinstance(space, SeparableSpace)
    reference = space.baselines()[list(space.baselines())[1]]
    child = space.mutate_after(reference, depth, rng)
    before, after = space.disassemble(reference), space.disassemble(child)
    changed = [slot for slot, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert changed
    assert min(map(space.block_of, changed)) >= int(4 * depth)


def test_separable_view_adds_up(space):
    if not isinstance(space, SeparableSpace):
        if space.parameters():
            return
        with pytest.raises(ValueError, match="a space with parameters"):
            space.from_parameters({}, 0, np.random.default_rng(0))
        return
    rng = np.random.default_rng(0)
    for target in range(len(space.targets)):
        candidate = space.sample(rng, target)
        options = space.disassemble(candidate)
        low, high = space.usage_bounds(target)
        assert len(options) == len(space.slots)
        assert low <= sum(space.usage(slot, option) for slot, option in enumerate(options)) <= high
    for slot in range(len(space.slots)):
        usages = [space.usage(slot, option) for option in space.options(slot)]
        shares = [space.share(slot, option) for option in space.options(slot)]
        assert space.options(slot)[0] == usages[0] == shares[0] == 0
        assert usages == sorted(usages)
        assert shares == sorted(shares)
        assert shares[-1] <= 1
    assert space.disassemble(space.baselines()["dense"]) == (0,) * len(space.slots)


def test_costs_are_known_and_pruning_never_adds(space):
    dense, *others = [space.cost(candidate) for candidate in space.baselines().values()]
    for cost in others:
        assert cost.keys() == dense.keys()
        assert all(cost[name] <= dense[name] for name in ("params", "size_bytes", "macs", "kv_bytes"))


def test_parameters_make_the_candidate_again(space):
    rng = np.random.default_rng(0)
    for target in range(len(space.targets) if space.parameters() else 0):
        candidate = space.sample(rng, target)
        values = space.to_parameters(candidate)
        known: dict[str, int] = {}
        for parameter in space.parameters():
            assert parameter.applies(known) == (parameter.name in values)
            if parameter.name in values:
                known[parameter.name] = values[parameter.name]
                assert parameter.low <= values[parameter.name] <= parameter.high
        assert known == values
        assert space.from_parameters(values, target, rng) == candidate
        lowest = {parameter.name: parameter.low for parameter in space.parameters()}
        assert space.target_of(space.from_parameters(lowest, target, rng)) == target


@pytest.mark.parametrize("text", ["", "densest", ":", "allocation", "x:1,2", "allocation:", "allocation:1"])
def test_other_texts_are_refused(space, text):
    with pytest.raises(ValueError, match="Expected"):
        space.parse(text)
