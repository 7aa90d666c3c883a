"""Kinds of gradients: one pass for several, kept in files, and refused where there is no memory for them."""

from __future__ import annotations

import pytest
import torch

from secateur.pruners.calibration.gradient_kinds import KINDS
from secateur.pruners.calibration.gradients import (
    collect_gradients,
    gradient_bytes,
    kind_path,
    model_statistics,
)
from secateur.pruners.models import memory
from secateur.pruners.stores.block_files import load_tensors
from tests.models import random_tokens, rms_gradients, small_anatomy

TOKENS = random_tokens(3, 10)
ALL = tuple(KINDS)


@pytest.mark.parametrize("kind", ALL)
def test_kinds_together_are_what_each_is_alone(kind):
    anatomy = small_anatomy()
    together, alone = collect_gradients(anatomy, TOKENS, ALL), collect_gradients(anatomy, TOKENS, (kind,))
    for linear in anatomy.linears:
        assert torch.equal(together[kind][linear.name], alone[kind][linear.name])


def test_kinds_of_one_value_share_a_pass():
    seen = []
    collect_gradients(small_anatomy(), TOKENS, ("rms", "mean", "sums"), on_window=seen.append)
    assert seen == [0, 1, 2]
    collect_gradients(small_anatomy(), TOKENS, ALL, on_window=seen.append)
    assert seen == [0, 1, 2] * 3


def test_signed_and_unsigned_gradients_agree_on_one_window():
    found = collect_gradients(small_anatomy(), TOKENS[:1], ("rms", "mean"))
    for name, unsigned in found["rms"].items():
        assert torch.allclose(found["mean"][name].abs(), unsigned, atol=1e-9)
        assert (found["mean"][name] < 0).any()
    for name, unsigned in rms_gradients(small_anatomy(), TOKENS).items():
        mean = collect_gradients(small_anatomy(), TOKENS, ("mean",))["mean"][name]
        assert (mean.abs() <= unsigned + 1e-9).all()
        break


def test_kinds_are_kept_in_files_of_their_own(tmp_path, monkeypatch):
    anatomy, path = small_anatomy(), tmp_path / "g.safetensors"
    first = model_statistics(anatomy, TOKENS, gradients=("rms",), path=path, identity="m t")
    both = model_statistics(anatomy, TOKENS, gradients=("rms", "sums"), path=path, identity="m t")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["g-sums.safetensors", "g.safetensors"]
    assert both.gradients.keys() == {"rms", "sums"}
    monkeypatch.setattr(
        "secateur.pruners.calibration.gradients.collect_gradients", None
    )  # would be called otherwise
    again = model_statistics(anatomy, TOKENS, gradients=("sums", "rms"), path=path, identity="m t")
    for name, tensor in first.gradients["rms"].items():
        assert torch.equal(again.gradients["rms"][name], tensor)
        assert torch.equal(again.gradients["sums"][name], both.gradients["sums"][name])
    assert load_tensors(kind_path(path, "sums"), "another") is None
    assert model_statistics(anatomy, TOKENS, gradients=()).gradients == {}


# --- memory ---


def test_what_there_is_no_memory_for_does_not_start(monkeypatch):
    anatomy = small_anatomy()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(anatomy.model, "forward", None)  # would be called otherwise
    with pytest.raises(
        ValueError, match=r"Expected 0\.00 GB of memory for gradients of windows of 10 tokens on cpu"
    ):
        rms_gradients(anatomy, TOKENS)
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)  # not known: not checked
    with pytest.raises(TypeError):
        rms_gradients(anatomy, TOKENS)


def test_the_memory_of_gradients_grows_with_what_is_asked_for():
    anatomy = small_anatomy()
    n_weights = sum(linear.n_weights for linear in anatomy.linears)
    one, two = (gradient_bytes(anatomy, kinds, 16) for kinds in (("rms",), ("rms", "mean")))
    assert two - one == 4 * n_weights
    assert gradient_bytes(anatomy, ("rms",), 64) > one
    n_params = sum(p.numel() for p in anatomy.model.parameters())
    anatomy.model.bfloat16()
    assert gradient_bytes(anatomy, ("rms",), 16) - one == 4 * n_params


def test_memory_that_is_left_is_the_least_of_machine_and_control_group(tmp_path, monkeypatch):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:   9000 kB\nMemAvailable:    5000 kB\nHugePages_Total:  0\n")
    monkeypatch.setattr(memory, "_MEMINFO", info)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert memory.available_bytes(cpu) == 5000 * 1024
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 500000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(cpu) == 5000 * 1024
    (tmp_path / "memory.max").write_text("4000000\n")
    assert memory.available_bytes(cpu) == 1_500_000
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    (tmp_path / "memory.max").unlink()
    assert memory.available_bytes(cpu) is None
