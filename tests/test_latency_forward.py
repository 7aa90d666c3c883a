"""What is timed: forward passes of a model, and of stacks of its blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.evaluators.latency.conditions import LatencySetup
from secateur.evaluators.latency.forward import Forward
from secateur.evaluators.latency.stacks import cut_stack, depth, exchanged
from secateur.evaluators.latency.table import points
from secateur.pruners.models.find_layout import find_layouts
from secateur.spaces.latency import PHASES
from tests.models import random_tokens, small_anatomy


@pytest.fixture(scope="module")
def anatomy():
    return small_anatomy(n_layers=3)


@pytest.mark.parametrize("phase", PHASES)
@torch.no_grad()
def test_a_forward_pass_can_be_repeated_and_equals_the_models_own(anatomy, phase):
    forward = Forward(anatomy.model, phase, LatencySetup(prompt=7))
    logits = []
    for _ in range(3):
        with forward.ready() as call:
            logits.append(call().logits)
    assert {x.shape for x in logits} == {(1, 1, anatomy.vocab_size)}
    assert all(torch.equal(x, logits[0]) for x in logits)
    tokens = torch.randint(anatomy.vocab_size, (1, 7), generator=torch.Generator().manual_seed(0))
    if phase == "decode":
        tokens = torch.cat([tokens, tokens[:, :1]], 1)
    assert torch.allclose(logits[0][:, -1], anatomy.model(input_ids=tokens).logits[:, -1], atol=1e-4)


def test_a_prompt_that_does_not_fit_is_refused(anatomy):
    with pytest.raises(ValueError, match=r"Expected `prompt` < 64, .* got 64"):
        Forward(anatomy.model, "prefill", LatencySetup(prompt=64))


@torch.no_grad()
def test_stacks_of_whole_blocks_are_the_model_and_cut_ones_leave_it_alone(anatomy):
    tokens, before = random_tokens(2, 9), {k: v.clone() for k, v in anatomy.model.state_dict().items()}
    logits = anatomy.model(input_ids=tokens).logits
    layouts = find_layouts(anatomy)
    whole, cut, empty = (cut_stack(layouts, *shape) for shape in ((2, 48), (1, 12), (0, 0)))
    with exchanged(anatomy, whole):
        assert torch.equal(anatomy.model(input_ids=tokens).logits, logits)
    with exchanged(anatomy, cut):
        assert not torch.allclose(anatomy.model(input_ids=tokens).logits, logits)
    with exchanged(anatomy, empty):
        nothing = anatomy.model(input_ids=tokens).logits
    with exchanged(anatomy, nn.ModuleList()):
        assert torch.equal(anatomy.model(input_ids=tokens).logits, nothing)
    assert torch.equal(anatomy.model(input_ids=tokens).logits, logits)
    assert all(torch.equal(v, before[k]) for k, v in anatomy.model.state_dict().items())
    shapes = {name: tuple(p.shape) for name, p in cut[0].named_parameters() if p.ndim > 1}
    assert shapes["self_attn.o_proj.weight"] == (32, 16)
    assert shapes["self_attn.k_proj.weight"] == (8, 32)
    assert shapes["mlp.down_proj.weight"] == (32, 12)
    assert all(p.is_contiguous() for p in cut.parameters())


def test_stacks_stay_within_memory(anatomy, monkeypatch):
    assert depth(anatomy, 10) == 3
    monkeypatch.setattr("secateur.evaluators.latency.stacks.STACK_BYTES", 2 * 10 * 4 * 8000)
    assert depth(anatomy, 10) == 2
    monkeypatch.setattr("secateur.evaluators.latency.stacks.STACK_BYTES", 1)
    assert depth(anatomy, 10) == 1


@pytest.mark.parametrize(("n", "wanted"), [(1, [1]), (3, [1, 2, 3]), (48, [6, 12, 18, 24, 30, 36, 42, 48])])
def test_some_sizes_are_measured_the_full_one_always(n, wanted):
    assert points(n) == wanted
