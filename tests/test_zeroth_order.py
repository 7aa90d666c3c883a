"""Gradients from forward passes: one draw exactly, many against the gradient, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from secateur.pruners.calibration import zeroth_order
from secateur.pruners.calibration.gradient_kinds import KINDS
from secateur.pruners.calibration.gradients import collect_gradients, gradient_bytes, model_statistics
from secateur.pruners.calibration.pass_kinds import PASS_KINDS, n_bytes
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.calibration.zeroth_order import estimate_bytes, estimate_gradients
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.structure.evidence import Evidence
from secateur.spaces.methods import IMPORTANCES
from tests.models import random_tokens, small_anatomy
from tests.structures import take_few_passes

TOKENS = random_tokens(6, 12)
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}


def flat(tensors):
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def noise_of(anatomy, seed, draw):
    return {linear.name: zeroth_order._noise(seed, draw)(linear) for linear in anatomy.linears}


@pytest.mark.parametrize("transposed", [False, True])
def test_one_draw_is_the_slope_along_its_noise(transposed):
    if transposed:
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
        anatomy = dissect(GPT2LMHeadModel(GPT2Config(**sizes)).eval().requires_grad_(False))
    else:
        anatomy = small_anatomy()
    gradient = flat(collect_gradients(anatomy, TOKENS, ("mean",))["mean"])
    noise = flat(noise_of(anatomy, 3, 0))
    found = flat(estimate_gradients(anatomy, TOKENS, n_draws=1, seed=3))
    slope = float(gradient @ noise)
    assert float(found @ noise / (noise @ noise)) == pytest.approx(slope, rel=0.02)
    assert torch.allclose(found, slope * noise, rtol=0.02, atol=1e-9)


def test_windows_are_dealt_out_and_count_alike():
    """Four windows to three draws: each estimate is that of its own windows, weighted by how many it has."""
    anatomy = small_anatomy(**SMALL)
    whole = flat(estimate_gradients(anatomy, TOKENS[:4], n_draws=3))
    parts = [TOKENS[:4][draw::3] for draw in range(3)]
    wanted = torch.zeros_like(whole)
    for draw, part in enumerate(parts):
        gradient = flat(collect_gradients(anatomy, part, ("mean",))["mean"])
        noise = flat(noise_of(anatomy, 0, draw))
        wanted += len(part) / 4 * float(gradient @ noise) * noise
    assert torch.allclose(whole, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def test_many_draws_come_to_the_gradient():
    """Of K draws and N weights the correlation is about ``1 / sqrt(1 + N / K)``."""
    tiny = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1}
    anatomy = small_anatomy(n_layers=1, **tiny)
    gradient = flat(collect_gradients(anatomy, TOKENS[:1], ("mean",))["mean"])
    for n_draws, expected in ((5, 0.2), (60, 0.6)):
        found = flat(estimate_gradients(anatomy, TOKENS[:1], n_draws=n_draws))
        alike = float(torch.corrcoef(torch.stack([found, gradient]))[0, 1])
        assert alike == pytest.approx(expected, abs=0.2)
    assert float(found @ gradient / (gradient @ gradient)) == pytest.approx(1.0, abs=0.4)


def test_estimates_are_seeded_and_leave_the_model_alone():
    anatomy = small_anatomy(**SMALL)
    before = {name: (x.data_ptr(), x.clone()) for name, x in anatomy.model.named_parameters()}
    first, again, other = (
        flat(estimate_gradients(anatomy, TOKENS, n_draws=3, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    for name, parameter in anatomy.model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None


def test_lower_precision_is_no_matter():
    anatomy = small_anatomy(**SMALL)
    anatomy.model.bfloat16()
    half = flat(estimate_gradients(anatomy, TOKENS, n_draws=3))
    assert {x.dtype for x in anatomy.model.parameters()} == {torch.bfloat16}
    anatomy.model.float()
    assert torch.equal(half, flat(estimate_gradients(anatomy, TOKENS, n_draws=3)))


def test_losses_that_are_not_finite_are_named_and_the_model_is_put_back():
    anatomy = small_anatomy(**SMALL)
    dense = [linear.weight.clone() for linear in anatomy.linears]
    with pytest.raises(ValueError, match="Expected finite losses, got nan and nan"):
        estimate_gradients(anatomy, TOKENS, epsilon=float("inf"))
    assert all(torch.equal(a, b.weight) for a, b in zip(dense, anatomy.linears, strict=True))


def test_memory_is_that_of_the_estimates_and_a_block():
    anatomy = small_anatomy(n_layers=6)
    kinds = ("forward",)
    n_weights = sum(linear.n_weights for linear in anatomy.linears)
    assert gradient_bytes(anatomy, kinds, 16) == estimate_bytes(anatomy, 16) > 4 * n_weights
    both = gradient_bytes(anatomy, ("forward", "mean"), 16)
    assert both == estimate_bytes(anatomy, 16) + gradient_bytes(anatomy, ("mean",), 16)
    deeper = small_anatomy(n_layers=12)
    assert estimate_bytes(deeper, 16) - estimate_bytes(anatomy, 16) == 4 * n_weights


def test_both_registries_hold_different_kinds():
    assert not KINDS.keys() & PASS_KINDS.keys()
    assert {kind: n_bytes(kind) for kind in ("mean", "sums", "forward", "perturbed")} == {
        "mean": 4,
        "sums": 0,
        "forward": 4,
        "perturbed": 0,
    }


def test_forward_kinds_are_kept_in_files(tmp_path, monkeypatch):
    take_few_passes(monkeypatch)
    anatomy, path = small_anatomy(**SMALL), tmp_path / "g.safetensors"
    kinds = tuple(PASS_KINDS)
    first = model_statistics(anatomy, TOKENS, gradients=kinds, path=path, identity="m t")
    monkeypatch.setattr(
        "secateur.pruners.calibration.gradients.collect_gradients", None
    )  # would be called otherwise
    again = model_statistics(anatomy, TOKENS, gradients=kinds, path=path, identity="m t")
    for kind in kinds:
        assert torch.equal(flat(first.gradients[kind]), flat(again.gradients[kind]))


def test_mini_llm_by_hand():
    anatomy = small_anatomy()
    gradients = {"forward": {x.name: torch.randn(x.weight.shape) for x in anatomy.linears}}
    *_, last = stream_blocks(anatomy, TOKENS, outputs="moments")
    for part in find_layouts(anatomy)[1].sublayers:
        name, w = part.output.name, part.output.weight.double()
        seen = last.outputs[name]
        elements = w.abs() * seen.norm * gradients["forward"][name].double().abs()
        wanted = elements.sum(0).reshape(part.n_units, -1).sum(1)
        found = IMPORTANCES["mini_llm"].function(Evidence(part, seen, gradients, 0.01))
        assert torch.allclose(found.double(), wanted, rtol=1e-4)
