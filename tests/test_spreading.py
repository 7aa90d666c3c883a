"""A model over several devices: parts in runs, hidden states that move, weights that don't; workers and drivers."""

from __future__ import annotations

import pytest
import torch

from secateur.evaluators.session import Session
from secateur.evaluators.worker_setup import worker_setup
from secateur.pruners.calibration.gradients import collect_gradients
from secateur.pruners.models import memory
from secateur.pruners.models.checkpoints.checkpoint import ModelError
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.models.spreading import placement, spread
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.search.app.session import on_driver, plan
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity
from tests.models import random_tokens, small_llama
from tests.stand_in.devices import devices_of, stand_in
from tests.stand_in.labels import where
from tests.structures import CONFIGS, build
from tests.test_devices import same_measurements

EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [512], "test_tokens": 512}
LARGE = Fidelity("search", 512)


@pytest.fixture
def devices():
    with stand_in(2) as made:
        yield made


def test_parts_are_cut_into_runs_in_proportion_to_the_rooms():
    assert placement([10, 10, 10, 10], [100, 100]) == [0, 0, 1, 1]
    assert placement([10, 10, 10, 10], [300, 100]) == [0, 0, 0, 1]
    assert placement([30, 10, 10, 10], [100, 100]) == [0, 1, 1, 1]
    assert placement([10] * 8, [40, 20]) == [0, 0, 0, 0, 1, 1, 2, 2], "the rest is the host's"
    assert placement([10, 10], [15]) == [0, 1]
    assert placement([10, 10, 10], [100]) == [0, 0, 0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "opt", "opt-post-norm", "gpt2", "gpt_neox"])
def test_a_spread_model_gives_the_logits_of_one_device(devices, name):
    tokens = random_tokens(2, 9)
    wanted = build(CONFIGS[name])(tokens, use_cache=False).logits
    model = build(CONFIGS[name])
    spread(model)
    anatomy = dissect(model)
    assert {x.index for x in devices_of(model)} == {0, 1}
    found = model(tokens.to("cuda:0"), use_cache=False).logits
    assert torch.equal(found.cpu(), wanted)
    runner = BlockRunner(anatomy)
    hidden = runner.run(runner.start(tokens))
    assert torch.equal(anatomy.logits(anatomy.tail(hidden)).cpu(), wanted)


def test_hidden_states_move_and_weights_do_not(devices):
    model = small_llama(n_layers=4)
    spread(model)
    runner = BlockRunner(dissect(model))
    tokens = random_tokens(2, 9)
    inputs = runner.start(tokens)
    devices.events.clear()
    runner.run(inputs)
    assert devices.events.moves == 2 * 9 * 32 * 4, "once, between the second and the third block"
    assert devices.events.uploads == devices.events.downloads == 0


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "gblm"])
def test_a_spread_model_is_pruned_alike(devices, name):
    found = []
    for over in (False, True):
        model = small_llama()
        if over:
            spread(model)
        anatomy = dissect(model)
        prune(
            anatomy,
            {x.name: 0.5 for x in anatomy.linears},
            Method(name),
            random_tokens(4, 16),
            sequential=True,
        )
        found.append([x.weight.cpu() for x in anatomy.linears])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_of_a_spread_model_are_alike(devices):
    found = []
    for over in (False, True):
        model = small_llama()
        if over:
            spread(model)
        found.append(collect_gradients(dissect(model), random_tokens(4, 16), ("rms",))["rms"])
    assert all(torch.equal(x.cpu(), found[1][name].cpu()) for name, x in found[0].items())


def test_what_has_no_room_on_the_gpus_is_on_the_cpu(devices):
    model = small_llama(n_layers=4)
    size = sum(x.nbytes for x in model.model.layers[0].parameters())
    devices.free[:] = [round((97 * 32 * 4 + 1.5 * size) / 0.9), round(1.5 * size / 0.9)]
    tokens = random_tokens(2, 9)
    wanted = model(tokens, use_cache=False).logits
    spread(model)
    places = [str(where(layer.mlp.up_proj.weight)) for layer in model.model.layers]
    assert places == ["cuda:0", "cuda:1", "cpu", "cpu"]
    assert torch.equal(model(tokens.to("cuda:0"), use_cache=False).logits.cpu(), wanted)


# --- spaces, workers, drivers ---


def opened(device, directory, **space):
    raw = {"device": device, "dtype": "float32", "evaluator": EVALUATOR, "budget": {"evaluations": 5}}
    session = Session(plan(settings_from({**raw, "space": space})))
    session.build_levels(directory)
    return session


@pytest.mark.parametrize(
    "space",
    [
        {"target": 0.5, "step": 0.25, "max_sparsity": 0.75},
        {"kind": "architecture", "target": 0.3, "repair": ["none", "obs"]},
    ],
    ids=["levels", "architecture"],
)
def test_candidates_on_a_spread_model_measure_alike(devices, space, tmp_path):
    found = []
    devices.free[0] *= 2  # the embedding of tiny is half of it
    for device in ("cpu", "spread"):
        session = opened(device, tmp_path / device, **space)
        candidates = [x.text for x in list(session.space.baselines().values())[-2:]]
        measured = session.evaluator(tmp_path / device).evaluate(candidates, LARGE)
        found.append(measured)
    assert {where(x.weight).index for x in session.anatomy.linears} == {0, 1}
    same_measurements(*found)


def test_workers_of_a_share_plan_with_a_share_and_a_driver_may_have_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_share", 1.0)
    session = opened("cpu", tmp_path / "levels", target=0.5, step=0.25, max_sparsity=0.75)
    candidates = [x.text for x in list(session.space.baselines().values())[-2:]]
    wanted = session.evaluator(tmp_path / "levels").evaluate(candidates, LARGE)
    setup = worker_setup(
        session, tmp_path / "kit", tmp_path / "levels", threads=1, spread=False, device="cuda", share=0.25
    )
    with stand_in() as devices:
        evaluator = setup(setup.directories)
        found = evaluator.evaluate(candidates, LARGE)
        assert memory.total_bytes(torch.device("cuda", 0)) == devices.total // 4
        assert devices.events.uploads > 1_000_000, "weights and ranks"
    for one, other in zip(wanted, found, strict=True):
        assert other.values["kl"] == pytest.approx(one.values["kl"], rel=1e-4)


def test_a_driver_without_a_gpu_works_on_its_cpu_in_the_workers_precision():
    lines = []
    settings = settings_from({"device": "cuda", "executor": {"kind": "ray", "gpus_per_worker": 1}})
    found = on_driver(settings, lines.append)
    assert (found.device, found.dtype) == ("cpu", "bfloat16")
    assert len(lines) == 1
    assert on_driver(settings_from({"device": "cuda"})).device == "cuda", "which is refused when it is opened"
    assert on_driver(settings_from({"executor": {"kind": "ray", "gpus_per_worker": 1}})).device == "auto"
    with stand_in():
        assert on_driver(settings) is settings


# --- refusals ---


def test_a_device_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(
        ModelError, match=r"^Expected `device` to be auto or a torch device that is there, got 'cuda'"
    ):
        load_model("tiny", device="cuda")
    with stand_in(2), pytest.raises(ModelError, match=r"got 'cuda:2' \(CUDA error: invalid device ordinal\)"):
        load_model("tiny", device="cuda:2")


def test_less_memory_than_the_weights_take_is_refused_before_they_are_loaded(monkeypatch):
    with stand_in(1, free=3_000_000):
        monkeypatch.setattr(
            "transformers.AutoModelForCausalLM.from_pretrained", None
        )  # would be called otherwise
        with pytest.raises(
            ModelError, match=r"^Expected 0.00 GB of memory for the weights on cuda, got 0.00 GB"
        ):
            load_model("tiny", device="cuda")


@pytest.mark.parametrize(
    "command", [("evaluate", "tiny"), ("latency", "tiny"), ("prune", "tiny", "--recipe", "wanda")]
)
def test_commands_refuse_a_missing_device_with_status_2(secateur, command, tmp_path):
    more = ("--sparsity", "0.5", "--to", str(tmp_path / "out")) if command[0] == "prune" else ()
    status, _, err = secateur(*command, *more, "--device", "cuda:7")
    assert status == 2
    assert "Expected `device` to be auto or a torch device that is there, got 'cuda:7'" in err
    assert [line.startswith("secateur: error: ") for line in err.strip().splitlines()].count(True) == 1
    assert err.strip().splitlines()[-1].startswith("secateur: error: ")
    assert not (tmp_path / "out").exists()
