from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from pydantic import ValidationError

from secateur.search.budget import Budget
from secateur.search.controller import Trial
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.controllers.greedy import Greedy, GreedySettings
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.architecture.settings import ArchitectureSettings, build_architecture
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.shape import BlockShape, ModelShape
from tests.toy import LARGE, SMALL, SPACE, search, start

FIDELITIES = (Fidelity("search", 64), Fidelity("search", 256))
BLOCK = BlockShape(2, 60, 0, 12, 10, 0, 60, 10, 4)  # attention and MLP of equal size


def build(n_blocks: int, **settings):
    shape = ModelShape(10_000, 2, 10_000, 1_000, blocks=(BLOCK,) * n_blocks)
    return build_architecture(ArchitectureSettings(**settings), (), shape)


def run(controller, loss, *, shuffle: int | None = None, limit: float = np.inf) -> list:
    """Proposals in order, measured by `loss`, which gives None for what is infeasible."""
    done = []
    while len(done) < limit and (proposals := controller.ask(1000)):
        done += proposals
        if shuffle is not None:
            random.Random(shuffle).shuffle(proposals)
        for proposal in proposals:
            value = loss(proposal.candidate)
            result = {"infeasible": "too bad"} if value is None else {"values": {"loss": value}}
            controller.tell([Trial(0, Measurement(proposal.candidate.text, proposal.fidelity, **result))])
    return done


def solutions(done) -> list:
    return [proposal.candidate for proposal in done if proposal.fidelity == FIDELITIES[-1]]


def additive(space, seed: int):
    """A loss that is a sum over slots, convex in the options of each."""
    rng = np.random.default_rng(seed)
    curves = [np.cumsum(np.sort(rng.random(len(space.options(s))))) for s in range(len(space.slots))]
    return lambda c: float(sum(x[o] - x[0] for x, o in zip(curves, space.disassemble(c), strict=True)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("n_blocks", "settings", "moves"),
    [
        (6, {"units": ["mlp"]}, "sublayer"),
        (6, {"units": ["blocks"]}, "block"),
        (3, {"units": ["channels"], "ffn_step": 3}, "level"),
    ],
)
def test_where_removals_are_independent_it_finds_what_brute_force_finds(n_blocks, settings, moves, seed):
    space = build(n_blocks, target=[0.1667, 0.3333], **settings)
    loss = additive(space, seed)
    found = solutions(run(Greedy(space, FIDELITIES, 0, GreedySettings(moves=moves)), loss))
    everything = [
        space.assemble(o) for o in itertools.product(*(space.options(s) for s in range(len(space.slots))))
    ]
    for target, candidate in enumerate(found):
        assert candidate == min((c for c in everything if space.target_of(c) == target), key=loss)
    assert len(found) == 2


def test_what_goes_for_a_smaller_target_goes_for_a_larger_one_too():
    space = build(6, target=[0.1667, 0.3333, 0.5], units=["attention", "mlp"])
    rng = np.random.default_rng(0)
    pairs = rng.random((11, 11))

    def loss(candidate) -> float:
        gone = np.array(space.disassemble(candidate))
        return float(gone @ pairs @ gone)

    done = run(Greedy(space, FIDELITIES, 0, GreedySettings()), loss)
    options = [space.disassemble(candidate) for candidate in solutions(done)]
    assert [space.target_of(candidate) for candidate in solutions(done)] == [0, 1, 2]
    assert all(a <= b for low, high in itertools.pairwise(options) for a, b in zip(low, high, strict=True))
    # 11 slots, of which 2, 4 and 6 go, one a step; then the candidates of three targets.
    assert len(done) == 11 + 10 + 9 + 8 + 7 + 6 + 3


def test_the_order_of_results_does_not_matter():
    space = build(4, target=[0.25, 0.5])
    loss = additive(space, 0)
    plain = run(Greedy(space, FIDELITIES, 0, GreedySettings()), loss)
    for seed in range(3):
        assert run(Greedy(space, FIDELITIES, 0, GreedySettings()), loss, shuffle=seed) == plain


def test_blocks_lose_both_sub_layers_at_once():
    space = build(6, target=0.3333, units=["attention", "mlp", "channels"], protect=[0])
    done = run(Greedy(space, FIDELITIES, 0, GreedySettings(moves="block", n_tokens=64)), additive(space, 1))
    assert sum(kept == Kept(0, 0) for kept in done[-1].candidate.blocks) == 2
    steps = [proposal.candidate for proposal in done if proposal.fidelity == FIDELITIES[0]]
    assert all(candidate.blocks.count(Kept(0, 0)) == 1 for candidate in steps[:5])


def test_the_space_closes_the_gap_that_whole_removals_leave():
    space = build(6, target=[0.2, 0.4])
    done = run(Greedy(space, FIDELITIES, 0, GreedySettings(moves="block")), additive(space, 2))
    assert [space.target_of(candidate) for candidate in solutions(done)] == [0, 1]
    assert {kept.ffn for kept in solutions(done)[0].blocks} - {0, 12}


def test_infeasible_removals_are_not_made():
    space = build(4, target=0.5, units=["attention", "mlp"])

    def loss(candidate) -> float | None:
        return None if candidate.blocks[2].ffn == 0 else additive(space, 3)(candidate)

    (found,) = solutions(run(Greedy(space, FIDELITIES, 0, GreedySettings()), loss))
    assert found.blocks[2].ffn
    ended = run(Greedy(space, FIDELITIES, 0, GreedySettings()), lambda candidate: None)
    assert len(ended) == 7 + 1  # no second step; the target's candidate all the same


def test_it_searches_any_separable_space(tmp_path):
    controller = Greedy(SPACE, (SMALL, LARGE), 0, GreedySettings())
    outcome, study, *_ = search(tmp_path, Budget(evaluations=100), controller=controller)
    assert outcome.reason == "finished"
    best = min(
        (t.measurement for t in study.trials if t.measurement.values and t.measurement.fidelity == LARGE),
        key=lambda m: (m.candidate.count("1") != 5, m.values["loss"]),
    )
    assert best.candidate == "1011110000"  # what begins with 11 is infeasible


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    def go(directory, n: int) -> list[tuple[str, str]]:
        controller = Greedy(SPACE, (SMALL, LARGE), 0, GreedySettings())
        search(directory, Budget(evaluations=n), controller=controller)
        with start(directory) as study:
            return [trial.measurement.key for trial in study.trials]

    for n in (5, 17, 100):
        keys = go(tmp_path / "stopped", n)
    assert keys == go(tmp_path / "whole", 100)


def test_evolution_goes_on_from_its_solutions():
    space = build(6, target=0.3333, units=["attention", "mlp"])
    loss = additive(space, 4)
    first = run(Greedy(space, FIDELITIES, 0, GreedySettings()), loss)
    controller = Evolution(space, FIDELITIES, 0, EvolutionSettings(start="greedy"))
    done = run(controller, loss, limit=len(first) + 2)
    assert done[: len(first) - 1] == first[:-1]
    assert {first[-1].candidate, space.baselines()["uniform@0.3333"]} <= set(solutions(done))
    assert controller.elites == ((first[-1].candidate,),)


def test_bad_use_is_refused():
    with pytest.raises(ValidationError, match="moves"):
        GreedySettings(moves="head")
    with pytest.raises(ValueError, match="one of the fidelities"):
        Greedy(build(4), FIDELITIES, 0, GreedySettings(n_tokens=100))
    with pytest.raises(ValueError, match="for `greedy`, got TiedSpace"):
        Greedy(build(4, tied=True), FIDELITIES, 0, GreedySettings())
