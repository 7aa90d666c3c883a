"""Mixtures cut to some of their experts: as the family's own class computes with so many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateur.pruners.models.experts import Experts, split_experts
from secateur.pruners.models.mixture import LiveMixture, Mixture, find_mixture
from tests.mixtures import MIXTURES, make_mixture


def _mixture(name: str, **changes: Any) -> Mixture:
    model = make_mixture(name, **changes)
    split_experts(model)
    path, block = next(
        (path, block)
        for path, block in model.model.layers.named_children()
        if any(isinstance(module, Experts) for module in block.modules())
    )
    return find_mixture(block, f"model.layers.{path}")


def _output(mixture: Mixture, hidden: torch.Tensor) -> torch.Tensor:
    output = mixture.module(hidden)
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _hidden() -> torch.Tensor:
    return torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))


GROUPED = {"deepseek_v2": 2, "deepseek_v3": 2}


@pytest.mark.parametrize("name", MIXTURES)
def test_router_and_limits_are_found(name: str) -> None:
    mixture = _mixture(name)
    assert mixture.router.shape == (6, 32)
    assert mixture.n_groups == GROUPED.get(name, 1)
    assert mixture.top_k == (1 if name == "llama4_text" else 2)
    n_entries = {"deepseek_v3": 2, "ernie4_5_moe": 2, "gpt_oss": 2}  # a correction bias, a bias
    assert len(mixture.entries) == n_entries.get(name, 1)
    assert mixture.fewest == {"phimoe": 2, "deepseek_v3": 4, "deepseek_v2": 2}.get(name, 1)


@pytest.mark.parametrize("name", MIXTURES)
def test_cut_experts_are_never_used_and_the_others_as_before(name: str) -> None:
    """Where no token was routed to the experts that go, nothing changes; the order of the kept ones stays."""
    mixture = _mixture(name)
    hidden, live = _hidden(), LiveMixture(mixture)
    gone = (1, 4)  # one of each group
    kept = tuple(index for index in range(6) if index not in gone)
    with torch.no_grad():
        dense = _output(mixture, hidden)
        live.cut(kept)
        for index in gone:
            mixture.experts[index].register_forward_hook(lambda *_: pytest.fail("a removed expert ran"))
        cut = _output(mixture, hidden)
        assert cut.shape == dense.shape
        assert torch.isfinite(cut).all()
        assert not torch.allclose(cut, dense)
        live.cut(kept)  # the same again
        assert torch.equal(_output(mixture, hidden), cut)


def test_cut_mixture_equals_one_whose_router_never_chooses_the_others() -> None:
    mixture = _mixture("gpt_oss")  # its router has a bias, which can rule experts out
    hidden, live = _hidden(), LiveMixture(mixture)
    bias = mixture.entries[1].tensor
    with torch.no_grad():
        dense = bias.clone()
        bias[[0, 5]] = -1e9
        wanted = _output(mixture, hidden)
        bias.copy_(dense)
        live.cut((1, 2, 3, 4))
        torch.testing.assert_close(_output(mixture, hidden), wanted)


@pytest.mark.parametrize("name", MIXTURES)
def test_restored_mixture_is_the_same_bit_for_bit(name: str) -> None:
    mixture = _mixture(name)
    hidden, live = _hidden(), LiveMixture(mixture)
    pointers = [p.data_ptr() for p in mixture.module.parameters()]
    with torch.no_grad():
        dense = _output(mixture, hidden)
        down: Any = mixture.experts[5].down_proj
        zeros = torch.zeros_like(down.weight)
        live.cut(mixture.best((5, 4, 3, 2, 1, 0), mixture.fewest), {"5.down_proj.weight": zeros})
        assert not torch.equal(_output(mixture, hidden), dense)
        live.restore()
        assert torch.equal(_output(mixture, hidden), dense)
    assert [p.data_ptr() for p in mixture.module.parameters()] == pointers


def test_top_k_follows_where_fewer_experts_stay() -> None:
    mixture = _mixture("mixtral")
    live = LiveMixture(mixture)
    router: Any = mixture.entries[0].module
    live.cut((2,))
    assert (router.top_k, router.num_experts) == (1, 1)
    live.cut((2, 3, 5))
    assert (router.top_k, router.num_experts) == (2, 3)
    live.restore()
    assert (router.top_k, router.num_experts) == (2, 6)


def test_best_experts_are_as_many_of_each_group() -> None:
    mixture = _mixture("deepseek_v3")
    assert mixture.best((5, 4, 3, 2, 1, 0), 4) == (1, 2, 4, 5)
    with pytest.raises(ValueError, match=r"4 to 6 experts, a multiple of its 2 groups, got 5 .*\.1\.mlp"):
        mixture.check(5)


def test_a_router_that_can_not_be_cut_is_refused_by_name() -> None:
    class Wired(nn.Module):
        """Router of exactly six experts."""

        def __init__(self, router: Any) -> None:
            super().__init__()
            self.weight, self.top_k = router.weight, router.top_k

        def forward(self, hidden: torch.Tensor) -> Any:
            logits = nn.functional.linear(hidden.reshape(-1, 32), self.weight)
            weights, index = logits.view(-1, 2, 3).flatten(1).view(-1, 6).topk(self.top_k)
            return logits, weights, index

    model = make_mixture("mixtral")
    split_experts(model)
    block = model.model.layers[0]
    block.mlp.gate = Wired(block.mlp.gate)
    with pytest.raises(
        ValueError, match=r"router that works with fewer .* MixtralSparseMoeBlock.*\[at block\.mlp\]"
    ):
        find_mixture(block, "block")
    del block.mlp.gate.weight
    block.mlp.gate.weight = torch.zeros(3, 2)  # no matrix with a row an expert
    with pytest.raises(ValueError, match=r"one row for each of the 6 experts .*got 0 such matrices"):
        find_mixture(block, "block")
