"""Weights of routed experts: projections with statistics of their own tokens, pruned, and saved in the stock form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.calibration.stream import Walk, mean_loss, stream_blocks
from secateur.pruners.export.export import export_model
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.shape import model_shape
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from tests.cut_models import manifest, small_tokenizer
from tests.mixtures import MIXTURES, VOCABULARY, make_mixture

IDS = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MIXTURES)
def test_losses_are_those_of_transformers(name: str) -> None:
    model = make_mixture(name)
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    wanted = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    anatomy = dissect(model)
    assert not any(block.unknown for block in anatomy.blocks)
    walk = Walk(anatomy, IDS)
    for block in anatomy.blocks:
        walk.hidden = walk.through(block)
    assert mean_loss(anatomy, torch.cat(walk.hidden), IDS) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_statistics_of_an_expert_are_of_its_tokens(name: str) -> None:
    anatomy = dissect(make_mixture(name))
    *_, last = stream_blocks(anatomy, IDS, inputs="moments", experts=True)
    assert last.experts is not None
    routed = last.experts.n_routed.tolist()
    seen = {}
    for linear in last.block.linears:
        if linear.expert is not None and linear.role == "down":
            seen[int(linear.name.split(".experts.")[1].split(".")[0])] = last.inputs[linear.name].n_tokens
    assert [seen[index] for index in range(6)] == routed
    assert sum(routed) == IDS.numel() * last.experts.mixture.top_k


def test_router_weights_count_in_moe_pruner_alone() -> None:
    anatomy = dissect(make_mixture("mixtral"))
    *_, last = stream_blocks(anatomy, IDS, inputs="moments")
    linear = next(x for x in last.block.linears if x.expert is not None)
    inputs = last.inputs[linear.name]
    wanda, weighted = (Method(name).scores(linear, inputs) for name in ("wanda", "moe_pruner"))
    torch.testing.assert_close(wanda, linear.weight.abs() * inputs.norm)
    torch.testing.assert_close(weighted, linear.weight.abs() * inputs.routed_norm)
    assert (inputs.routed_norm < inputs.norm).all()  # weights are below one
    other = next(x for x in last.block.linears if x.expert is None)
    same = last.inputs[other.name]
    assert torch.equal(same.routed_norm, same.norm)


@pytest.mark.parametrize("metric", ["wanda", "moe_pruner", "sparsegpt"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_pruned_mixture_is_saved_in_the_stock_form(name: str, metric: str, tmp_path: Path) -> None:
    model: Any = make_mixture(name)
    anatomy = dissect(model)
    few = IDS[:1, :6]  # some experts get no token
    asked = {linear.name: 0.5 for linear in anatomy.linears}
    prune(anatomy, asked, Method(metric), few, sequential=True)
    for linear in anatomy.linears:
        assert int((linear.weight == 0).sum()) == linear.n_weights // 2
    record = manifest([])
    report = export_model(
        model,
        small_tokenizer(),
        tmp_path / "out",
        manifest=type(record)(**{**vars(record), "asked": asked}),
        check_tokens=IDS[:2],
    )
    assert report.comparison.logit_error < 1e-4
    assert sum(report.manifest.zeros.values()) == sum(x.n_weights // 2 for x in anatomy.linears)


def test_macs_count_the_experts_that_a_token_uses() -> None:
    six, four = (
        model_shape(dissect(make_mixture("mixtral", num_experts=n, num_local_experts=n)), 16, 4)
        for n in (6, 4)
    )
    assert six.macs_per_token - four.macs_per_token == 2 * 2 * 32  # rows of the routers of two blocks
