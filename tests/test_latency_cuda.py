"""Latency on a CUDA device, on a stand-in: events, an emptied cache, graphs of decode steps, prefill without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur.evaluators.latency import clock as clock_module
from secateur.evaluators.latency.clock import WARM_UPS, captured, clock_of
from secateur.evaluators.latency.conditions import LatencySetup, conditions
from secateur.evaluators.latency.forward import Forward
from secateur.evaluators.latency.models import time_models
from secateur.evaluators.latency.table import measure_table
from secateur.pruners.models.discover import dissect
from tests.models import small_llama
from tests.stand_in.devices import stand_in

SETUP = LatencySetup(prompt=7, threads=1)
CUDA = torch.device("cuda", 0)


@pytest.fixture
def devices():
    with stand_in() as made:
        yield made


def model():
    return small_llama().to("cuda")


def test_a_decode_step_is_captured_once_and_replayed(devices):
    forward = Forward(model(), "decode", SETUP)
    for _ in range(3):
        with forward.ready() as call:
            call()
    assert [x for x in devices.log if x in ("capture", "captured", "replay")] == [
        "capture", "captured", "replay", "replay", "replay",
    ]  # fmt: skip


def test_steps_before_the_capture_start_from_the_same_cache(devices):
    forward = Forward(model(), "decode", SETUP)
    lengths = []
    run = forward._run

    class Watched:
        def __call__(self, *args, **kwargs):
            lengths.append(kwargs[forward._cache_name].get_seq_length())
            return run(*args, **kwargs)

    forward._run = Watched()
    with forward.ready():
        pass
    assert lengths == [7] * (WARM_UPS + 1)


@pytest.mark.parametrize(("phase", "eager"), [("prefill", False), ("decode", True)])
def test_prefill_and_eager_steps_are_calls(devices, phase, eager):
    forward = Forward(model(), phase, replace(SETUP, eager=eager))
    with forward.ready() as call:
        logits = call().logits
    assert logits.device == CUDA
    assert logits.shape == (1, 1, 97)
    assert "capture" not in devices.log


def test_the_cache_is_emptied_before_the_call(devices, monkeypatch):
    sizes, made = [], torch.zeros

    def zeros(*args, **kwargs):
        sizes.append((args, kwargs["device"]))
        return made(*args, **kwargs)

    monkeypatch.setattr(clock_module.torch, "zeros", zeros)
    reading = clock_of(CUDA)(lambda: devices.log.append("call"))
    assert sizes == [((2 << 20,), CUDA)], "twice the device's second-level cache"
    assert devices.log == ["synchronize", "record", "call", "record", "synchronize"]
    assert reading.wall_ms == 1.0


def test_what_can_not_be_captured_is_refused_in_one_line(devices, monkeypatch):
    def fails(graph):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(clock_module.torch.cuda, "graph", fails)
    with pytest.raises(ValueError, match=r"CUDA graph can hold.*\(operation not permitted when.*`eager`"):
        captured(lambda: None, CUDA)


def test_tables_and_models_are_timed_on_the_device(devices):
    anatomy = dissect(model())
    measured = measure_table(anatomy, SETUP, rounds=10)
    assert measured.conditions["device"] == "Stand-in"
    assert measured.conditions["decode"] == "graph"
    assert measured.dense["decode"].median == 1.0
    timings = time_models({"dense": anatomy.model}, SETUP, rounds=10)
    assert timings["decode"]["dense"].ms.median == 1.0


def test_graphs_are_a_condition_of_cuda_alone():
    anatomy = dissect(small_llama())
    assert "decode" not in conditions(anatomy, SETUP)
    assert conditions(anatomy, replace(SETUP, eager=True)) == conditions(anatomy, SETUP)
    assert replace(SETUP, eager=True).options == " --prompt 7 --threads 1 --eager"
