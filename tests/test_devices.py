"""Every way to prune and to measure on a GPU, with stand-ins for the devices: the CPU's results, and nothing mixed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from secateur.evaluators.session import Session
from secateur.pruners.calibration.gradients import collect_gradients
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.discover import dissect
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.search.app.session import plan
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity
from secateur.spaces.methods import (
    CUT_REPAIRS,
    DEPTH,
    DEPTH_REPAIRS,
    IMPORTANCES,
    METRICS,
    MODEL_RECONSTRUCTIONS,
    UPDATES,
)
from tests.models import random_tokens, small_llama
from tests.stand_in.devices import devices_of, stand_in
from tests.stand_in.labels import MixedDevicesError
from tests.structures import (
    CONFIGS,
    TOKENS,
    build,
    build_structure,
    key,
    repaired_blocks,
    take_few_passes,
)

CUDA = torch.device("cuda", 0)
EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [128, 512], "test_tokens": 512}
LARGE, TEST = Fidelity("search", 512), Fidelity("test", 512)
FEW = {"samples": [2, 4], "length": [32, 64], "pool_tokens": 512, "subsets": 2, "known": []}
SPACES = {
    "levels of a metric": {"target": 0.5, "step": 0.25, "max_sparsity": 0.75},
    "levels of a reconstruction": {"metric": "sparsegpt", "target": 0.5, "step": 0.25, "max_sparsity": 0.75},
    "architecture": {"kind": "architecture", "target": 0.3, "repair": ["none", "obs"]},
    "masks": {"kind": "masks", "target": 0.3},
    "formula": {"kind": "formula", "target": 0.6, "terminals": ["W", "G", "X", "H"]},
    "recipe of weights": {
        "kind": "recipe", "unit": "weights", **FEW, "metrics": ["blend", "sparsegpt"], "target": 0.5,
    },
    "recipe of structure": {
        "kind": "recipe", "unit": "structure", **FEW, "metrics": ["blend", "flap", "obs"], "target": 0.2,
    },
    "recipe of blocks": {
        "kind": "recipe", "unit": "blocks", **FEW, "metrics": ["shortgpt", "last"], "target": 0.17,
    },
}  # fmt: skip


@pytest.fixture
def devices():
    with stand_in() as made:
        yield made


def on_gpu(model):
    return dissect(model.to(CUDA))


# --- the stand-in ---


def test_the_stand_in_refuses_to_mix_and_counts_waits(devices):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.device == CUDA == (2 * there + torch.tensor(1.0)).device
    with pytest.raises(MixedDevicesError, match="add: Expected all tensors"):
        here + there
    with pytest.raises(MixedDevicesError, match="index on"):
        here[torch.zeros(1, dtype=torch.long, device="cuda")]
    with pytest.raises(TypeError, match="can't convert"):
        there.numpy()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:1")
    assert devices.events.uploads == 0
    assert float(there.sum()) == 3.0
    assert bool((there.cpu() == here).all())
    assert devices.events.waits == {"__float__": 1, "copy to host": 1}
    assert devices.events.downloads == 12


def test_the_stand_in_follows_a_model_and_its_gradients(devices):
    layer = torch.nn.Linear(3, 2).to("cuda")
    layer(torch.ones(1, 3, device="cuda")).sum().backward()
    assert devices_of(layer) == {CUDA}
    assert layer.weight.grad.device == CUDA == layer.weight.data.device


# --- ways to prune ---


@pytest.mark.parametrize("name", sorted({*METRICS, *UPDATES} - {*MODEL_RECONSTRUCTIONS, "sparsellm"}))
def test_every_metric_and_reconstruction_prunes_alike(devices, name):
    found = []
    for anatomy in (dissect(small_llama()), on_gpu(small_llama())):
        sparsity = {x.name: (0.0, 0.3, 0.5, 1.0)[i % 4] for i, x in enumerate(anatomy.linears)}
        second = random_tokens(4, 16, seed=1)
        prune(anatomy, sparsity, Method(name), random_tokens(4, 16), sequential=True, contrast=second)
        found.append([linear.weight for linear in anatomy.linears])
    assert {x.device for x in found[1]} == {CUDA}
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", IMPORTANCES)
def test_every_importance_and_repair_of_structure_builds_alike(devices, name, tmp_path, monkeypatch):
    take_few_passes(monkeypatch)
    repairs = tuple(CUT_REPAIRS) if name == "wanda_sp" else ("none",)
    models = {"cpu": dissect(build(CONFIGS["llama"])), "gpu": on_gpu(build(CONFIGS["llama"]))}
    for place, anatomy in models.items():
        build_structure(tmp_path / place, anatomy, TOKENS, key(name, repairs), contrast=TOKENS.flip(1))
    files = sorted(path.name for path in (tmp_path / "cpu").glob("*.safetensors"))
    assert files
    for file in files:
        one, other = load_file(tmp_path / "cpu" / file), load_file(tmp_path / "gpu" / file)
        assert one.keys() == other.keys()
        for x in one:  # orders alike; repairs are in fp32 on a GPU, in fp64 on a CPU
            torch.testing.assert_close(other[x], one[x], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DEPTH)
def test_every_score_of_blocks_is_alike(devices, name):
    found = []
    for anatomy in (dissect(small_llama(n_layers=4)), on_gpu(small_llama(n_layers=4))):
        row, tokens = DEPTH[name], random_tokens(4, 16)
        gradients = collect_gradients(anatomy, tokens, row.gradients) if row.gradients else {}
        influence = tuple(part.influence for part in stream_blocks(anatomy, tokens, inputs="moments"))
        found.append(row.function(anatomy, tokens, ModelStatistics(4, gradients, influence)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", DEPTH_REPAIRS)
def test_every_repair_of_blocks_is_alike(devices, name):
    found = []
    for anatomy in (dissect(small_llama(n_layers=4)), on_gpu(small_llama(n_layers=4))):
        made = repaired_blocks(anatomy, (1, 2), name, random_tokens(4, 16))
        found.append({(block, x): y.cpu() for block, new in made.items() for x, y in new.items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][x], found[1][x]) for x in found[0])


# --- spaces ---


def session_on(device: str, space: dict, directory: Path, **changes) -> Session:
    raw = {"device": device, "dtype": "float32", "space": space, "evaluator": EVALUATOR}
    made = Session(plan(settings_from({**raw, "budget": {"evaluations": 5}, **changes})))
    made.build_levels(directory)
    return made


def some_candidates(session: Session) -> list[str]:
    rng = np.random.default_rng(0)
    known = list(session.space.baselines().values())[-1:]
    drawn = session.space.sample(rng, 0)
    found = [*known, drawn, session.space.mutate(drawn, rng)]
    return list(dict.fromkeys(candidate.text for candidate in found))


@pytest.mark.parametrize("name", SPACES)
def test_candidates_of_every_space_measure_alike(devices, name, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        session = session_on(device, SPACES[name], tmp_path / device)
        candidates = some_candidates(session)
        evaluator = session.evaluator(tmp_path / device)
        measured = [*evaluator.evaluate(candidates, LARGE), *evaluator.evaluate(candidates[:1], TEST)]
        found.append(measured)
        assert {x.type for x in devices_of(session.loaded.model)} == {device}
    same_measurements(*found)


def same_measurements(wanted, found):
    """Equal counts, and losses up to rounding: repairs are in fp32 on a GPU, and its chunks of logits are larger."""
    assert len(wanted) == len(found) > 0
    for one, other in zip(wanted, found, strict=True):
        assert one.infeasible is None
        assert replace(other, values=one.values, windows=one.windows, seconds=one.seconds) == one
        assert other.values == pytest.approx(dict(one.values), rel=1e-3)
        assert other.windows == pytest.approx(one.windows, rel=1e-3)
