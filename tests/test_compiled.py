"""Blocks run by `torch.compile`: equal within rounding, once for all blocks and candidates, refused by name."""

from __future__ import annotations

import shutil

import pytest
import torch

from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.session import Session
from secateur.pruners.models import compiled
from secateur.pruners.models.runner import BlockRunner
from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.errors import UsageError
from secateur.search.settings.settings import identity, settings_from
from secateur.spaces.measurement import Fidelity
from tests.models import small_anatomy

EVALUATOR = {"window": 32, "calibration_tokens": 64, "fidelities": [64], "test_tokens": 64}
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def settings(**further):
    return settings_from(
        {"evaluator": EVALUATOR, "budget": {"evaluations": 3}, "compile": "always", **further}
    )


@pytest.fixture
def counted(monkeypatch):
    """Blocks compiled without a compiler of machine code: graphs as torch has traced them, counted."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    made = torch.compile(compiled.call, dynamic=False, backend=backend)
    monkeypatch.setattr("secateur.pruners.models.runner.compiled_call", lambda: made)
    torch.compiler.reset()
    return graphs


def test_all_blocks_of_a_shape_and_all_candidates_share_one_graph(counted):
    anatomy = small_anatomy(n_layers=12)  # more than torch would compile one by one
    eager, runner = BlockRunner(anatomy), BlockRunner(anatomy, compiled=True)
    inputs = eager.start(torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(0)))
    assert torch.equal(runner.run(inputs), eager.run(inputs))
    assert len(counted) == 1
    before = eager.run(inputs)
    for linear in anatomy.blocks[3].linears:
        linear.point_to(linear.weight * 0.5)
    after = runner.run(inputs)
    assert torch.equal(after, eager.run(inputs)), "with the weights that the blocks have now"
    assert not torch.equal(after, before)
    assert len(counted) == 1
    other = eager.start(torch.randint(97, (3, 8), generator=torch.Generator().manual_seed(0)))
    assert torch.equal(runner.run(other), eager.run(other))
    assert len(counted) == 2, "of another shape of the batch, which stays as it is"


def test_the_evaluator_runs_candidates_and_the_dense_side_so(counted, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.evaluators.session.check_compiler", lambda device: None)
    found = []
    for word in ("never", "always"):
        session = Session(plan(settings(compile=word)))
        session.build_levels(tmp_path / word)
        assert not counted
        texts = [x.text for x in session.space.baselines().values()][:2]
        found.append(session.evaluator(tmp_path / word).evaluate(texts, Fidelity("search", 64)))
    assert len(counted) == 1
    eager, by_graph = ([x.values for x in measured] for measured in found)
    assert by_graph[0]["kl"] == eager[0]["kl"]
    assert by_graph[1] == pytest.approx(eager[1], rel=1e-5)


@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of what torch imports for it
def test_machine_code_gives_the_same_numbers_within_rounding():
    compiled.check_compiler(torch.device("cpu"))
    anatomy = small_anatomy(n_layers=2)
    eager, runner = BlockRunner(anatomy), BlockRunner(anatomy, compiled=True)
    inputs = eager.start(torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(runner.run(inputs), eager.run(inputs), rtol=1e-4, atol=1e-5)


def test_by_default_nothing_is_compiled_and_runs_are_the_same(monkeypatch):
    usual = settings_from({"evaluator": EVALUATOR})
    assert (usual.compile, plan(usual).compiled) == ("never", False)
    assert identity(usual) == identity(settings(budget={"evaluations": 300}))
    anatomy = small_anatomy(n_layers=2)
    data = EvaluationData(anatomy, {"search": torch.zeros(2, 8, dtype=torch.int64)}, [Fidelity("search", 16)])
    assert data.runner._call is compiled.call


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"space": {"kind": "architecture"}}, r"candidates of the space architecture, whose blocks differ"),
        (
            {"space": {"kind": "recipe", "unit": "structure", "target": 0.2}},
            r"candidates of the space recipe",
        ),
        (
            {"dtype": "float32", "stream": "always", "controller": {"kind": "uniform"}},
            r"a streamed model, whose weights are converted",
        ),
    ],
)
def test_what_would_be_compiled_again_and_again_is_refused(tmp_path, further, message):
    with pytest.raises(UsageError, match=f"Expected `compile: never`, got always with {message}"):
        app.search(settings(**further), tmp_path / "run")
    assert not (tmp_path / "run" / "measurements.jsonl").exists()


def test_a_missing_compiler_is_named_before_the_search(tmp_path, monkeypatch):
    def fail(*of, **more):
        raise RuntimeError("Failed to find C++ compiler\nat length")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(
        UsageError, match=r"`torch\.compile` can use on cpu, got none \(Failed to find C\+\+ comp"
    ):
        app.search(settings(), tmp_path / "run")
    with pytest.raises(UsageError, match="`compile`"):
        settings(compile="often")
