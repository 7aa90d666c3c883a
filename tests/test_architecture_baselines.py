"""Starting points of architectures that scores of the dense model give."""

from __future__ import annotations

import pickle
import re
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from secateur.pruners.models.discover import dissect
from secateur.pruners.structure.store import StructureStore, build_structure
from secateur.search.controller import Trial
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.results.targets import references
from secateur.spaces.architecture.candidate import GONE, Kept
from secateur.spaces.architecture.scores import Scores
from secateur.spaces.architecture.settings import ArchitectureSettings, build_architecture
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import BlockShape, ModelShape
from tests.structures import CONFIGS, TOKENS, key
from tests.structures import build as build_model

N_BLOCKS, GROUPS, FFN = 8, 4, 24
BLOCK = BlockShape(GROUPS, 70, 7, FFN, 10, 3, 90, 10, 4)
FIDELITIES = (Fidelity("search", 64), Fidelity("search", 256))
KINDS = ("flap", "shortgpt")


def scores_of(attention, mlp, influence) -> Scores:
    return Scores(attention, mlp, influence, {"shortgpt": influence})


def draw(seed: int) -> Scores:
    """Heavy tails, as fluctuations have; of each sub-layer with mean 0 and variance 1."""
    rng = np.random.default_rng(seed)
    drawn = [
        rng.standard_exponential((N_BLOCKS, n)) ** rng.uniform(0.5, 3, (N_BLOCKS, 1)) for n in (GROUPS, FFN)
    ]
    attention, mlp = (((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)).tolist() for x in drawn)
    return scores_of(attention, mlp, tuple(rng.random(N_BLOCKS).tolist()))


def build(**settings):
    shape = ModelShape(10_000, 2, 10_000, 1_000, blocks=(BLOCK,) * N_BLOCKS)
    return build_architecture(ArchitectureSettings(**settings), (), shape)


# --- FLAP ---


def released_allocation(scores: Scores, target: float) -> list[Kept]:
    """As FLAP's released code has it (AL-AM): how many units of each sub-layer are above the threshold."""
    units = np.concatenate([np.ravel(scores.attention), np.ravel(scores.mlp)])
    order = np.argsort(-units)
    costs = np.where(order < N_BLOCKS * GROUPS, BLOCK.group_params, BLOCK.channel_params)
    reached = np.abs(np.cumsum(costs) - costs.sum() * (1 - target)).argmin()
    threshold = units[order][reached]
    pairs = zip(scores.attention, scores.mlp, strict=True)
    return [Kept(*(int((np.array(x) > threshold).sum()) for x in pair)) for pair in pairs]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0.2, 0.5])
def test_flap_keeps_what_is_above_one_threshold_in_the_whole_model(seed, target):
    space, scores = build(target=target, ffn_step=1), draw(seed)
    found = space.from_scores("flap", scores, 0)
    wanted = released_allocation(scores, target)
    apart = [
        abs(a - b) * cost
        for x, y in zip(found.blocks, wanted, strict=True)
        for a, b, cost in zip(x.units, y.units, (70, 10), strict=True)
    ]
    assert found.blocks[0].kv_groups
    assert (
        sum(apart) <= 2 * BLOCK.group_params
    )  # the one at the threshold, norms, and the first block's last group
    uniform = space.uniform(0)
    assert sum(found.blocks[i] != uniform.blocks[i] for i in range(N_BLOCKS)) > 4


def test_flap_rounds_to_the_nearest_level():
    scores = draw(0)
    for target in (0.2, 0.5):
        fine, coarse = (build(target=target, ffn_step=step).from_scores("flap", scores, 0) for step in (1, 6))
        apart = [abs(x.ffn - y.ffn) for x, y in zip(fine.blocks, coarse.blocks, strict=True)]
        assert max(apart) <= 6
        assert np.mean(apart) <= 3.5


def test_flap_leaves_alone_what_may_not_go():
    scores = draw(1)
    found = build(target=0.3, units=["channels"], protect=[2]).from_scores("flap", scores, 0)
    assert {kept.kv_groups for kept in found.blocks} == {GROUPS}
    assert found.blocks[2] == Kept(GROUPS, FFN)


# --- ShortGPT ---


@pytest.mark.parametrize(
    "units", [["blocks"], None, ["groups", "channels", "attention", "mlp", "blocks"]], ids=str
)
def test_shortgpt_drops_the_blocks_of_least_influence(units):
    influence = (0.0, 0.5, 0.3, 0.1, 0.2, 0.4, 0.6, 0.7)  # the first block must stay
    scores = scores_of(draw(0).attention, draw(0).mlp, influence)
    found = build(target=[0.25, 0.5], units=units)
    for target, gone in enumerate([{3, 4}, {2, 3, 4, 5}]):
        candidate = found.from_scores("shortgpt", scores, target)
        assert {i for i, kept in enumerate(candidate.blocks) if kept == GONE} == gone
        assert found.target_of(candidate) == target


def test_the_block_that_is_next_loses_what_is_missing():
    scores = scores_of((), (), (0.8, 0.5, 0.3, 0.1, 0.2, 0.4, 0.6, 0.7))
    found = build(target=0.32, ffn_step=2).from_scores("shortgpt", scores, 0)
    assert [i for i, kept in enumerate(found.blocks) if kept == GONE] == [3, 4]
    cut = found.blocks[2]
    assert (cut.kv_groups / GROUPS, cut.ffn / FFN) == pytest.approx((0.5, 0.4), abs=0.1)
    assert {kept for i, kept in enumerate(found.blocks) if i not in {2, 3, 4}} == {Kept(GROUPS, FFN)}


def test_shortgpt_of_tied_blocks_drops_as_many_as_it_can():
    scores = scores_of((), (), (0.0, 0.5, 0.3, 0.1, 0.2, 0.4, 0.6, 0.7))
    space = build(target=[0.3, 0.5], tied=True, protect=[4])
    first, second = (space.from_scores("shortgpt", scores, target) for target in (0, 1))
    assert [i for i, kept in enumerate(first.blocks) if kept == GONE] == [2, 3]
    assert [i for i, kept in enumerate(second.blocks) if kept == GONE] in ([2, 3, 5], [1, 2, 3, 5])
    assert len({*first.blocks} - {GONE}) == 1
    assert space.from_scores("flap", scores, 0) is None
    only_widths = build(target=0.3, tied=True, units=["groups", "channels"])
    assert only_widths.from_scores("shortgpt", scores, 0) is None


# --- as baselines ---

CASES = [
    {},
    {"units": ["groups", "channels", "attention", "mlp", "blocks"], "repair": ["none", "obs"]},
    {"target_format": "gguf"},
    {"of": "macs", "protect": [1, 2]},
    {"of": "kv_bytes", "units": ["groups"]},
    {"tied": True},
    {"units": ["blocks"]},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_meet_their_targets_and_are_like_any_other_candidate(case):
    settings = ArchitectureSettings(target=[0.25, 0.5], **case)
    space = build(**settings.model_dump())
    before = space.baselines()
    for seed in range(10):
        named = space.scored_baselines(settings.scored, draw(seed))
        labels = [f"{kind}@{target}" for kind in settings.scored for target in (0.25, 0.5)]
        assert set(named) <= set(labels)
        assert len(named) >= len(labels) / 2
        for name, candidate in named.items():
            assert space.target_of(candidate) == [0.25, 0.5].index(float(name.partition("@")[2]))
            assert space.parse(candidate.text) == candidate
        assert len({*before.values(), *named.values()}) == len(before) + len(named)  # each one once
        further = pickle.loads(pickle.dumps(space.with_baselines(named)))
        assert further.baselines() == before | named
        assert list(further.baselines())[: len(before)] == list(before)
        assert further.scored_baselines(settings.scored, draw(seed)) == named  # those that it has don't count
        assert further.with_baselines({}).baselines() == space.baselines() == before


@pytest.mark.parametrize(
    ("settings", "scored"),
    [
        ({}, KINDS),
        ({"baselines": []}, ()),
        ({"baselines": ["shortgpt", "shortgpt"]}, ("shortgpt",)),
        ({"units": ["groups", "channels"]}, ("flap",)),
        ({"units": ["attention", "mlp"]}, ("shortgpt",)),
        ({"units": ["mlp"]}, ()),
        ({"tied": True}, ("shortgpt",)),
        ({"tied": True, "units": ["channels"]}, ()),
    ],
    ids=str,
)
def test_only_what_the_units_can_make_is_made(settings, scored):
    assert ArchitectureSettings(**settings).scored == scored
    for kind in set(KINDS) - set(scored) if "baselines" not in settings else ():
        with pytest.raises(
            ValidationError, match=re.escape(f"Expected `baselines` that `units` can make, got {kind}")
        ):
            ArchitectureSettings(**settings, baselines=[kind])


def measured(candidate, fidelity, number=0, loss=0.0):
    values = {"loss": loss, "sparsity": 0.25}
    return Trial(number, Measurement(candidate.text, fidelity, values))


def test_evolution_starts_from_them_and_sensitivity_departs_from_uniform_ones():
    space = build(target=[0.25, 0.5])
    space = space.with_baselines(space.scored_baselines(KINDS, draw(0)))
    assert len(space.baselines()) == 7
    row = CONTROLLERS["evolution"]
    controller = row.build(space, FIDELITIES, 0, row.settings())
    first = controller.ask(100)
    assert {p.candidate for p in first if p.fidelity == FIDELITIES[-1]} == {*space.baselines().values()} - {
        space.dense
    }
    best = space.baselines()["flap@0.5"]
    controller.tell([measured(p.candidate, p.fidelity, loss=float(p.candidate != best)) for p in first])
    controller.ask(1)
    assert controller.elites[1] == (best,)
    row = CONTROLLERS["sensitivity"]
    controller = row.build(space, FIDELITIES, 0, row.settings(levels=[0.25, 0.75], around="uniform"))
    asked = {p.candidate for p in controller.ask(1)}
    assert asked == {space.uniform(0)}
    while asked:
        proposals = controller.ask(100)
        asked = {p.candidate for p in proposals}
        controller.tell([measured(p.candidate, p.fidelity) for p in proposals])
        assert not asked & {space.baselines()[f"{kind}@0.5"] for kind in KINDS}


def test_others_are_compared_with_the_uniform_one():
    space = build(target=0.25)
    named = space.with_baselines(space.scored_baselines(KINDS, draw(0))).baselines()
    trials = {name: measured(c, FIDELITIES[-1], number) for number, (name, c) in enumerate(named.items())}
    assert references(trials) == {"0.25": "uniform@0.25"}


@pytest.mark.parametrize(("kind", "settings"), [("sensitivity", {"levels": [0.5]}), ("greedy", {})])
@pytest.mark.parametrize("repair", [["none"], ["none", "obs", "refit"]], ids=str)
def test_solutions_are_proposed_with_every_repair(kind, settings, repair):
    space, row = build(target=0.25, repair=repair), CONTROLLERS[kind]
    controller = row.build(space, FIDELITIES, 0, row.settings(**settings))
    found, asked = [], []
    while proposals := controller.ask(1000):
        controller.tell(
            [
                measured(p.candidate, p.fidelity, loss=float(sum(x.ffn for x in p.candidate.blocks)))
                for p in proposals
            ]
        )
        asked += [p.candidate for p in proposals if p.fidelity == FIDELITIES[0]]
        found += [p.candidate for p in proposals if p.fidelity == FIDELITIES[-1]]
    assert sorted(space.config(candidate)["repair"] for candidate in found) == repair
    assert len({candidate.blocks for candidate in found}) == 1
    assert len(set(asked)) == len(asked)
    assert {space.config(candidate)["repair"] for candidate in asked} == {"none"}


# --- from a model ---


def test_a_block_that_does_nothing_goes_first(tmp_path):
    config = deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 4
    anatomy = dissect(build_model(config))
    for linear in anatomy.blocks[2].linears:
        if linear.role in ("o", "down"):
            linear.weight.mul_(1e-3)
    build_structure(tmp_path, anatomy, TOKENS, key(repairs=("none",)))
    scores = StructureStore(tmp_path, anatomy).scores
    scores = replace(scores, blocks={"shortgpt": scores.influence})
    block = BlockShape(2, 100, 10, 48, 10, 10, 100, 10, 4)
    shape = ModelShape(10_000, 2, 10_000, 1_000, blocks=(block,) * 4)
    settings = ArchitectureSettings(target=0.25)
    named = build_architecture(settings, (), shape).scored_baselines(settings.scored, scores)
    assert set(named) == {"flap@0.25", "shortgpt@0.25"}
    assert named["shortgpt@0.25"].blocks[2] == GONE
