"""Positions that pruning damages most, of `weighted_kl`: chosen by a reference, kept by a run, sent to workers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from secateur.evaluators.damaged import DAMAGED_SHARE, read_damaged, reference_of
from secateur.evaluators.worker_setup import worker_setup
from secateur.search import app
from secateur.search.app.session import open_session
from secateur.search.results.run import open_run
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity
from tests.measures import EVALUATOR, SPACES, settings


@pytest.fixture(scope="module")
def damaged_run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    app.run(directory, **settings(evaluator={**EVALUATOR, "loss": "weighted_kl", "measures": ["acceptance"]}))
    return directory


def test_the_positions_are_the_worst_fifth_of_each_window_under_the_reference(damaged_run):
    run = open_run(damaged_run)
    session = open_session(run.settings)
    session.open_damaged(damaged_run)
    assert session.damaged is not None
    reference = reference_of(session.space)
    assert reference == session.space.baselines()["uniform@0.9"].text, "of the middle target"
    tokens = session.windows["search"][:2]
    with torch.no_grad():
        dense = session.loaded.model(input_ids=tokens).logits.double().log_softmax(-1)
    config = session.config(reference)
    session.pruner.prune(config, sequential=False)
    with torch.no_grad():
        pruned = session.loaded.model(input_ids=tokens).logits.double().log_softmax(-1)
    kl = (dense.exp() * (dense - pruned)).sum(-1)
    n = math.ceil(DAMAGED_SHARE * 64)
    for row, chosen in zip(kl, session.damaged["search"], strict=False):
        assert int(chosen.sum()) == n == 13
        assert set(chosen.nonzero()[:, 0].tolist()) == set(row.topk(n).indices.tolist())


def test_weighted_kl_is_the_loss_and_ranks_among_the_damaged(damaged_run):
    run = open_run(damaged_run)
    for trial in run.trials():
        values = trial.measurement.values
        assert values["loss"] == values["weighted_kl"]
        assert 0 <= values["acceptance"] <= 1
    uniform = run.baselines["uniform@0.9"].measurement.values
    assert uniform["weighted_kl"] > 1.3 * uniform["kl"], "the reference's own worst positions"


def test_a_run_keeps_its_positions_when_it_goes_on_with_other_windows(damaged_run):
    run = open_run(damaged_run)
    path = next(damaged_run.glob("damaged-*.safetensors"))
    session = open_session(run.settings)
    before, reference = read_damaged(path, session.windows)
    more = settings(
        evaluator={
            **EVALUATOR,
            "loss": "weighted_kl",
            "measures": ["acceptance"],
            "fidelities": [128, 256, 384],
        },
        space={"kind": "allocation", **SPACES["allocation"], "target": [0.5, 0.7, 0.9]},
        budget={"evaluations": 5},
    )
    continued = open_session(settings_from(more))
    assert read_damaged(path, continued.windows) == (None, reference)
    with pytest.raises(ValueError, match="Expected the positions of `weighted_kl` for these windows"):
        continued.open_damaged(damaged_run)
    app.run(damaged_run, **more)
    after, same = read_damaged(path, continued.windows)
    assert same == reference
    assert before is not None
    assert after is not None
    assert torch.equal(after["search"][:4], before["search"])
    assert torch.equal(after["test"], before["test"])


def test_positions_that_cannot_be_read_are_named_in_a_line(damaged_run, tmp_path):
    session = open_session(open_run(damaged_run).settings)
    name = next(damaged_run.glob("damaged-*.safetensors")).name
    (tmp_path / name).write_bytes(b"0123")
    with pytest.raises(
        ValueError, match=r"Expected the positions of `weighted_kl` in .*, got a file that can't be"
    ):
        session.open_damaged(tmp_path)


def test_workers_get_the_positions_of_the_driver(tmp_path):
    session = open_session(settings_from(settings(evaluator={**EVALUATOR, "loss": "weighted_kl"})))
    session.build_levels(tmp_path / "levels")
    session.open_damaged(tmp_path, tmp_path / "levels")
    setup = worker_setup(session, tmp_path / "kit", tmp_path / "levels", threads=1, spread=False)
    text = session.space.baselines()["uniform@0.5"].text
    fidelity = Fidelity("search", 256)
    (there,) = setup(setup.directories).evaluate([text], fidelity)
    (here,) = session.evaluator(tmp_path / "levels").evaluate([text], fidelity)
    assert there.values == here.values
    assert there.values["loss"] == there.values["weighted_kl"] != there.values["kl"]
