"""How architectures vary, and that controllers search them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from secateur.search.controller import Trial
from secateur.search.controllers.registry import CONTROLLERS
from secateur.spaces.architecture.candidate import Architecture, Kept
from secateur.spaces.architecture.space import ArchitectureSpace
from secateur.spaces.measurement import Fidelity, Measurement
from tests.architectures import (
    BLOCK,
    EVERYTHING,
    FFN,
    GROUPS,
    build,
)

CASES = [
    {"target": [0.15, 0.4]},
    {"target": [0.2, 0.5], "units": EVERYTHING, "repair": ["none", "refit", "obs"], "protect": [2]},
    {"target": 0.5, "units": ["attention", "mlp", "blocks"]},
    {"target": [0.3, 0.6], "of": "latency_decode", "target_format": "gguf", "multiple_of": 64},
    {"target": [0.25, 0.5], "target_format": "hf-stock", "repair": ["none", "bias"], "protect": [7]},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_targets_hold_under_thousands_of_variations(settings):
    space, rng = build(**settings), np.random.default_rng(0)
    tied = not isinstance(space, ArchitectureSpace)
    n_targets = len(space.targets)
    parents = [space.sample(rng, target) for target in range(n_targets)]
    n_same = 0
    for turn in range(500):
        target = turn % n_targets
        parent, other = parents[target], parents[turn // 7 % n_targets]
        text = parent.text
        children = [space.mutate(parent, rng), space.crossover(parent, other, rng)]
        children.append(space.repair(children[0], (target + 1) % n_targets, rng))
        children.append(space.repair(children[2], target, rng))
        assert [space.target_of(child) for child in children] == [
            target,
            target,
            (target + 1) % n_targets,
            target,
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
        parents[target] = children[int(rng.integers(2))]
    assert n_same == 0


def test_targets_are_met_to_within_half_a_level_of_the_finest_slot():
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
        met = {c for c in map(space.assemble, itertools.product(*options)) if space.target_of(c) == 0}
        reached = {space.baselines()["uniform@" + f"{space.targets[0]:g}"]}
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
        pairs = [(a.units, b.units) for a, b in zip(candidate.blocks, child.blocks, strict=True)]
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


def test_candidates_without_a_target_are_not_varied():
    for space in (build(), build(tied=True)):
        with pytest.raises(ValueError, match="meet a target"):
            space.mutate(space.baselines()["dense"], np.random.default_rng(0))


# --- controllers run on it unchanged ---


def loss_of(candidate: Architecture) -> float:
    """Late attention and early channels are needed most."""
    blocks = enumerate(candidate.blocks)
    return sum((i + 1) * (3 - groups) / 3 + (7 - i) * (1 - ffn / FFN) ** 2 for i, (groups, ffn, *_) in blocks)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("uniform", {}),
        ("random", {}),
        ("evolution", {"offspring": 6}),
        ("evolution", {"start": "sensitivity", "sensitivity": {"levels": [0.3]}, "offspring": 6}),
        ("sensitivity", {"levels": [0.5]}),
        ("greedy", {}),
        ("surrogate", {"offspring": 6}),
        ("surrogate", {"prior": "sensitivity", "sensitivity": {"levels": [0.3]}, "offspring": 6}),
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
    needs_slots = kind in {"sensitivity", "greedy", "surrogate"} or settings.get("start") == "sensitivity"
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
    for target in (0, 1):
        losses = [loss_of(candidate) for candidate in final if space.target_of(candidate) == target]
        assert losses
        if kind in {"evolution", "sensitivity", "surrogate"}:
            assert min(losses) < loss_of(list(space.baselines().values())[1 + target])
