"""SparseLLM: MLPs pruned as one, by alternating over what lies between their projections."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.calibration.stream import stream_states
from secateur.pruners.models.discover import dissect
from secateur.pruners.weights import sparsellm as module
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.pruners.weights.sparsellm import best_outputs, best_products, nearer_gates, sparsellm
from secateur.spaces.levels import n_zeros
from tests.models import random_tokens, small_anatomy
from tests.structures import CONFIGS, build

TOKENS = random_tokens(12, 48)
SPARSEGPT = Method("sparsegpt")


def pruned(anatomy, sparsity):
    states = zip(anatomy.blocks, stream_states(anatomy, TOKENS), strict=False)
    return {block.index: sparsellm(anatomy, block, TOKENS, x, sparsity) for block, x in states}


def half(anatomy):
    return {linear.name: 0.5 for linear in anatomy.linears}


@pytest.fixture(scope="module")
def anatomy():
    return small_anatomy()


@pytest.fixture(scope="module")
def found(anatomy):
    return pruned(anatomy, half(anatomy))


def error(mlp, dense, inputs):
    return float((mlp(inputs) - dense(inputs)).square().mean())


def mlp_inputs(anatomy):
    seen = []
    mlp = anatomy.blocks[0].module.mlp
    handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    anatomy.model(TOKENS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["llama", "llama-biased", "gemma2"])
def test_the_first_step_is_sparsegpt(name, monkeypatch):
    monkeypatch.setattr(module, "N_STEPS", 1)
    anatomy = dissect(build(CONFIGS[name]))
    given = {linear.name: 0.3 + 0.1 * (index % 3) for index, linear in enumerate(anatomy.linears)}
    found = pruned(anatomy, given)
    other = dissect(deepcopy(anatomy.model))
    prune(other, given, SPARSEGPT, TOKENS, sequential=False)
    for linear in other.linears:
        assert torch.allclose(found[linear.block][linear.name], linear.weight, atol=1e-4)


def test_alternating_brings_the_outputs_nearer_than_pruning_each_projection_alone(anatomy, found):
    inputs = mlp_inputs(anatomy)
    dense = anatomy.blocks[0].module.mlp
    other = dissect(deepcopy(anatomy.model))
    prune(other, half(other), SPARSEGPT, TOKENS, sequential=False)
    alone = error(other.blocks[0].module.mlp, dense, inputs)
    for linear in other.blocks[0].linears:
        linear.point_to(found[0][linear.name])
    assert error(other.blocks[0].module.mlp, dense, inputs) < 0.95 * alone


def test_zeros_are_as_many_as_were_asked_for_and_the_model_stays(anatomy):
    before = {linear.name: linear.weight.clone() for linear in anatomy.linears}
    down, query = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    found = pruned(anatomy, {down: 0.7, query: 0.25})
    assert found[0] == {}
    mlp = {linear.name for linear in anatomy.blocks[1].linears if linear.sublayer == "mlp"}
    assert found[1].keys() == {query, *mlp}
    zeros = {name: int((weight == 0).sum()) for name, weight in found[1].items()}
    wanted = {query: n_zeros(0.25, 32 * 32), down: n_zeros(0.7, 32 * 48)}
    assert zeros == dict.fromkeys(mlp, 0) | wanted
    assert all(torch.equal(linear.weight, before[linear.name]) for linear in anatomy.linears)


def test_it_repeats(anatomy, found):
    again = pruned(anatomy, half(anatomy))
    assert all(torch.equal(again[0][name], weight) for name, weight in found[0].items())


def test_auxiliary_variables_are_set_to_their_optima():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    y, down, products, ups, gates = draw(5, 4), draw(4, 6), draw(5, 6), draw(5, 6), draw(5, 6)

    def loss_of_p(p):
        return (y - p @ down.T).square().sum() + (p - products).square().sum()

    p = best_products(y, down, products)
    assert torch.func.grad(loss_of_p)(p).abs().max() < 1e-10

    def loss_of_z(z):
        return (p - gates * z).square().sum() + (z - ups).square().sum()

    z = best_outputs(ups, gates, p)
    assert torch.func.grad(loss_of_z)(z).abs().max() < 1e-10

    def loss_of_s(s):
        return (p - F.silu(s) * z).square().sum() + (s - gates).square().sum()

    start = gates + 0.5
    assert loss_of_s(nearer_gates(gates, start, z, p, F.silu)) < loss_of_s(start)


@pytest.mark.parametrize(("name", "roles"), [("opt", "up, down"), ("phi3", "gate_up, down")])
def test_other_mlps_are_refused(name, roles):
    anatomy = dissect(build(CONFIGS[name]))
    with pytest.raises(ValueError, match=f"gate, up and down for sparsellm, got {roles} at .*Use the metric"):
        pruned(anatomy, half(anatomy))


def test_unknown_names_are_refused(anatomy):
    with pytest.raises(ValueError, match="Expected the name of a projection, got 'up'"):
        pruned(anatomy, {"up": 0.5})


def test_memory_is_checked_before(anatomy, monkeypatch):
    monkeypatch.setattr("secateur.pruners.models.memory.available_bytes", lambda device: 1)
    with pytest.raises(ValueError, match="memory for SparseLLM on 576 calibration tokens"):
        pruned(anatomy, half(anatomy))


def test_rows_of_weights_in_half_precision_are_in_one_run():
    anatomy = dissect(small_anatomy().model.to(torch.bfloat16))
    for weight in pruned(anatomy, half(anatomy))[0].values():
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous()
