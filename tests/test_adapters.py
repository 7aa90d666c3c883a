"""Adapters of sparse recovery, against their papers' formulas; and what each method of recovery trains."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from secateur.evaluators.training.adapters import (
    MaskedUpdate,
    PlainUpdate,
    ScaledUpdate,
    SparsityPreserving,
    attach,
)
from secateur.evaluators.training.settings import LEARNING_RATES, Training
from secateur.evaluators.training.slope import LazyAdapter, kept_backward
from secateur.evaluators.training.trainer import Trainer
from secateur.pruners.models.discover import dissect
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from tests.models import random_tokens, small_anatomy

TRAIN = random_tokens(12, 16, seed=1)


def pruned(**changes):
    anatomy = small_anatomy(**changes)
    prune(anatomy, {x.name: 0.5 for x in anatomy.linears}, Method("magnitude"), TRAIN, sequential=False)
    return anatomy


def with_adapter(kind, rank, values, anatomy=None):
    """Weights of a projection without and with an adapter of these left and right values, and after the merge."""
    anatomy = anatomy or pruned()
    linear = anatomy.blocks[0].linears[0]
    before = linear.weight.clone()
    merge = attach([linear], kind, rank, seed=0)
    (adapter,) = linear.module.parametrizations.weight
    left, right = values
    with torch.no_grad():
        adapter.left.copy_(left)
        adapter.right.copy_(right)
    live = linear.module.weight.detach()
    live = live.T.clone() if linear.transposed else live.clone()
    merge()
    assert type(linear.module).__name__ in ("Linear", "Conv1D")
    assert isinstance(linear.module.weight, torch.nn.Parameter)
    return before, live, linear.weight


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def slow_spp(weight, alpha, beta):
    """The released merge, where the runs are equally long: ``W + s W * repeat(alpha) * beta``."""
    repeated = torch.repeat_interleave(alpha, len(weight) // len(alpha), dim=0)
    return weight + 16 / 8 * repeated * beta.view(-1, 1) * weight


@pytest.mark.parametrize(
    ("kind", "rank", "values", "wanted"),
    [
        (
            SparsityPreserving,
            16,
            (normal(32, 1), normal(16, 32)),
            lambda w, left, right: slow_spp(w, right, left),
        ),
        (MaskedUpdate, 4, (normal(32, 4), normal(4, 32)), lambda w, b, a: w + 2 * (b @ a) * (w != 0)),
        (PlainUpdate, 4, (normal(32, 4), normal(4, 32)), lambda w, b, a: w + 2 * (b @ a)),
        (ScaledUpdate, 4, (normal(32, 4), normal(4, 32)), lambda w, b, a: w * (b @ a)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_adapters_by_their_formulas(kind, rank, values, wanted):
    before, live, merged = with_adapter(kind, rank, values)
    assert torch.allclose(live, wanted(before, *values), rtol=1e-5, atol=1e-6)
    assert torch.equal(merged, live)
    if kind is not PlainUpdate:
        assert (merged[before == 0] == 0).all()


@pytest.mark.parametrize("kind", [SparsityPreserving, MaskedUpdate, ScaledUpdate, PlainUpdate])
def test_a_new_adapter_changes_nothing(kind):
    anatomy, reference = pruned(), pruned()
    merge = attach(anatomy.linears, kind, 4, seed=0)
    assert torch.allclose(anatomy.model(TRAIN).logits, reference.model(TRAIN).logits, atol=1e-5)
    merge()
    for one, other in zip(anatomy.linears, reference.linears, strict=True):
        assert torch.allclose(one.weight, other.weight, rtol=1e-6)


def test_runs_of_rows_are_as_even_as_they_can_be_where_the_rank_does_not_divide():
    weight = torch.ones(7, 3)
    linear = small_anatomy().blocks[0].linears[0]
    adapter = SparsityPreserving(linear, 3, torch.Generator())
    adapter.right.data = torch.arange(3.0)[:, None].expand(3, 3).contiguous()
    adapter.left.data = torch.ones(7, 1)
    assert adapter.change(weight)[:, 0].tolist() == [1, 1, 1, 3, 3, 5, 5]


def test_weights_that_are_stored_transposed():
    torch.manual_seed(0)
    anatomy = dissect(
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    )
    anatomy.model.requires_grad_(False)
    prune(anatomy, {x.name: 0.5 for x in anatomy.linears}, Method("magnitude"), TRAIN, sequential=False)
    values = normal(96, 1), normal(16, 32)
    before, live, merged = with_adapter(SparsityPreserving, 16, values, anatomy)
    assert torch.allclose(live, slow_spp(before, values[1], values[0]), rtol=1e-5)
    assert torch.equal(merged, live)


def learning(method, **changes):
    anatomy = pruned(n_layers=5, **changes)
    trainer = Trainer(anatomy, Training(method=method, loss="ce", tokens=64, batch=2, rank=4, lr=1e-2), TRAIN)
    return anatomy, trainer, {*trainer._trained}


def test_perp_trains_norms_biases_updates_and_a_head_of_its_own():
    anatomy, trainer, names = learning("perp", tie_word_embeddings=False, attention_bias=True)
    assert {"model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= names
    assert {x for x in names if x.startswith("lm_head")} == {
        "lm_head.parametrizations.weight.0.left",
        "lm_head.parametrizations.weight.0.right",
    }
    assert "model.layers.0.mlp.up_proj.parametrizations.weight.0.left" in names
    assert not any(x.endswith("original") or "embed" in x for x in names)
    head = anatomy.head.weight.clone()
    trainer.train(2)
    trainer.finish()
    assert not torch.equal(anatomy.head.weight, head)
    _, _, tied = learning("perp")
    assert not any("lm_head" in x or "embed" in x for x in tied)


def test_last_trains_three_blocks_the_final_norm_and_the_head():
    anatomy, _, names = learning("last", tie_word_embeddings=False)
    blocks = {x.split(".")[2] for x in names if x.startswith("model.layers.")}
    assert blocks == {"2", "3", "4"}
    assert {x for x in names if not x.startswith("model.layers.")} == {"model.norm.weight", "lm_head.weight"}
    assert sum("layers.4" in x for x in names) == len([*anatomy.blocks[4].module.parameters()])


def test_rates_are_the_published_ones():
    """SPP's finetune.py, PERP's main.py and the note on Reassessing."""
    assert {name: LEARNING_RATES[name] for name in ("spp", "perp", "last")} == {
        "spp": 4e-3,
        "perp": 5e-4,
        "last": 1e-5,
    }


def test_slope_prunes_the_backward_pass_a_second_time():
    anatomy = pruned()
    linear = anatomy.blocks[0].linears[0]
    weight = linear.weight.clone()
    adapter = LazyAdapter(linear, 4, seed=0)
    linear.module.weight.requires_grad_(True)
    inputs, gradient = normal(3, 5, 32).requires_grad_(), normal(3, 5, 32)
    output = linear.module(inputs)
    assert torch.allclose(output, inputs @ weight.T)
    output.backward(gradient)
    assert torch.allclose(inputs.grad, gradient @ (weight * adapter.kept), atol=1e-6)
    wanted = torch.einsum("wto,wti->oi", gradient, inputs)
    assert torch.allclose(linear.module.weight.grad, wanted.detach(), atol=1e-4)
    assert linear.module.lazy_left.grad is None, "asleep"
    by_group = adapter.kept.reshape(8, 4, 32)
    assert (by_group.sum(1) == 2).all()
    dropped = weight.abs().reshape(8, 4, 32).masked_fill(by_group, 0).amax(1)
    assert (weight.abs().reshape(8, 4, 32).masked_fill(~by_group, torch.inf).amin(1) >= dropped).all()
    assert kept_backward(torch.ones(6, 3)).all()


def test_slope_s_adapters_learn_in_the_last_steps_alone_and_keep_zeros():
    anatomy, trainer, names = learning("slope")
    assert "model.layers.0.self_attn.q_proj.lazy_right" in names
    linear = anatomy.blocks[0].linears[0]
    zeros = linear.weight == 0
    assert trainer.n_steps == 2
    trainer.train(1)
    assert not linear.module.lazy_right.any()
    trainer.train(1)
    left, right = linear.module.lazy_left.detach().clone(), linear.module.lazy_right.detach().clone()
    before = linear.weight.clone()
    assert right.any()
    trainer.finish()
    assert torch.allclose(linear.weight, before + (left @ right / 4).masked_fill(zeros, 0), atol=1e-7)
    assert (linear.weight[zeros] == 0).all()
    assert not hasattr(linear.module, "lazy_left")
    assert "forward" not in vars(linear.module)
