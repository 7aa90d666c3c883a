"""From a greedy run to the order that the allocation rule `prefix` follows."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import Layer, RuleEvidence
from secateur.pruners.recipes.allocation.profile import read_profile
from secateur.search.controller import Trial
from secateur.search.controllers.greedy import Greedy, GreedySettings
from secateur.search.errors import UsageError
from secateur.search.results.removal_order import order_of, removal_order
from secateur.search.results.run import Run
from secateur.search.settings.settings import resolved, settings_from
from secateur.search.study.about import About
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import BlockShape, ModelShape
from tests.runs import make_run

FIDELITIES = (Fidelity("search", 1024), Fidelity("search", 2048))
BLOCK = BlockShape(2, 60, 0, 12, 10, 0, 60, 10, 4)  # attention and MLP of equal size
SHAPE = ModelShape(10_000, 2, 10_000, 1_000, blocks=(BLOCK,) * 4)
HURTS = {(1, "mlp"): 1, (3, "attention"): 2, (2, "mlp"): 3, (0, "mlp"): 4}  # all others more


def make(directory, moves: str, units: list[str]) -> Run:
    """A run of the controller `greedy`, without a model."""
    settings = settings_from(
        {
            "space": {"kind": "architecture", "target": 0.5, "units": units},
            "controller": {"kind": "greedy", "moves": moves},
            "evaluator": {"fidelities": [1024, 2048]},
        }
    )
    space = SPACES["architecture"].build(settings.space, (), SHAPE)
    facts = {"shape": {"linears": [], **asdict(SHAPE)}, "versions": {}}
    baselines = {name: candidate.text for name, candidate in space.baselines().items()}
    controller = Greedy(space, FIDELITIES, 0, GreedySettings(moves=moves))
    with Study.open_or_create(
        directory, resolved(settings), About({"content": {}}, baselines, facts)
    ) as study:
        while proposals := controller.ask(100):
            for proposal in proposals:
                value = {"loss": loss(proposal.candidate), **space.cost(proposal.candidate)}
                found = Measurement(proposal.candidate.text, proposal.fidelity, value, n_tokens=1)
                controller.tell([Trial(0, found)])
                study.append([found])
    return Run(Study.open(directory))


def loss(candidate) -> float:
    parts = (
        (i, kind, kept)
        for i, block in enumerate(candidate.blocks)
        for kind, kept in zip(("attention", "mlp"), block.units, strict=True)
    )
    return sum(
        HURTS.get((i, kind), 9) * (1 - kept / {"attention": 2, "mlp": 12}[kind]) for i, kind, kept in parts
    )


def test_the_least_further_with_the_lowest_loss_comes_next():
    a, b, c = (1, "attention"), (1, "mlp"), (2, "mlp")
    losses = [
        ((a,), 0.3),
        ((b,), 0.2),
        ((a, c), 0.0),
        ((b, c), 0.5),
        ((b, a), 0.4),
        ((), 0.1),
        ((a, b, c), 0.9),
    ]
    steps = removal_order((frozenset(lacks), loss) for lacks, loss in losses)
    assert steps == [{b}, {a}, {c}]  # not {a, c}, which lacks no b
    assert removal_order([]) == []


def test_what_a_greedy_run_removed_is_a_prefix(tmp_path, secateur):
    run = make(tmp_path / "run", "sublayer", ["attention", "mlp"])
    order = [{"block": block, "kind": kind} for block, kind in HURTS]
    assert order_of(run) == order
    status, out, _ = secateur("order", tmp_path / "run")
    assert status == 0
    (tmp_path / "order.yaml").write_text(out)
    profile = read_profile(tmp_path / "order.yaml")
    layers = [Layer(i, *of) for i in range(4) for of in (("attention", 60, 2), ("mlp", 10, 12))]
    gone = allocate("prefix", layers, RuleEvidence(profile=profile), 0.375)
    assert gone == (0, 0, 0, 12, 0, 12, 2, 0)
    assert '"kind": "attention"' in secateur("order", tmp_path / "run", "--json")[1]


def test_blocks_that_went_at_once_are_one_line(tmp_path, secateur):
    make(tmp_path / "run", "block", ["blocks"])
    _, out, _ = secateur("order", tmp_path / "run")
    assert out.splitlines() == ["- {block: 1}", "- {block: 3}"]


def test_a_run_without_whole_removals_is_named(tmp_path):
    with pytest.raises(UsageError, match="Expected a run that removed whole sub-layers or blocks, got none"):
        order_of(make_run(tmp_path / "run"))
