"""Experts as separate projections: every family's mixture computes, and is saved, as transformers has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.pruners.models.experts import Expert, Experts, joined_experts, split_experts
from tests.mixtures import MIXTURES, VOCABULARY, make_mixture

IDS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", MIXTURES)
def test_split_experts_compute_what_the_fused_ones_do(name: str) -> None:
    model = make_mixture(name)
    wanted, n_parameters = _logits(model), sum(p.numel() for p in model.parameters())
    split_experts(model)
    experts = [module for module in model.modules() if isinstance(module, Expert)]
    assert len(experts) in (6, 12)  # six of each block that has a mixture
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    assert {p.ndim for e in experts for p in e.parameters()} <= {1, 2}
    torch.testing.assert_close(_logits(model), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", MIXTURES)
def test_changed_experts_are_saved_in_the_stock_form(name: str, tmp_path: Path) -> None:
    model = make_mixture(name)
    split_experts(model)
    expert = next(module for module in model.modules() if isinstance(module, Expert))
    expert.up_proj.weight.data = expert.up_proj.weight.data * 0.5  # type: ignore[union-attr]  # a tensor of its own
    expert.down_proj.weight.data[:, ::2] = 0  # in place
    wanted = _logits(model)
    with joined_experts(model):
        assert not any(isinstance(module, Experts) for module in model.modules())
        torch.testing.assert_close(_logits(model), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
        model.save_pretrained(tmp_path)
    assert any(isinstance(module, Experts) for module in model.modules())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(_logits(again), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_every_token_is_seen_without_another_output(name: str) -> None:
    model = make_mixture(name)
    split_experts(model)
    wanted, seen = _logits(model), []
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    experts.every_token = True
    experts[3].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    torch.testing.assert_close(_logits(model), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert seen == [IDS.numel()]


def test_unknown_fused_experts_are_refused() -> None:
    model = make_mixture("mixtral")
    for block in model.model.layers:
        block.mlp.experts.act_fn = torch.nn.Dropout(0.5)  # random: no form computes the same
    with pytest.raises(
        ValueError,
        match=r"gate, up and down projections, got MixtralExperts, .* model\.layers\.0\.mlp\.experts",
    ):
        split_experts(model)
