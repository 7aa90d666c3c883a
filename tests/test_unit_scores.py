"""Published importances of units, against slow references; where released code has a defect, the difference."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.calibration.gradient_kinds import KINDS
from secateur.pruners.calibration.gradients import collect_gradients
from secateur.pruners.calibration.pass_kinds import CONTRAST_KINDS, PASS_KINDS
from secateur.pruners.calibration.statistics import OutputStatistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.llm_bip import contributions
from secateur.pruners.structure.method import importance_order
from secateur.pruners.structure.pruning import prune_structure
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.methods import CUT_REPAIRS, IMPORTANCES
from tests.structures import CONFIGS, TOKENS, build, logits, take_few_passes

BLOCK, DAMP = 1, 0.01
N_WINDOWS = len(TOKENS)


@pytest.fixture(scope="module")
def anatomy():
    config = deepcopy(CONFIGS["qwen2"])
    config.num_attention_heads, config.num_key_value_heads = 8, 4
    return dissect(build(config))


@pytest.fixture(scope="module")
def evidence(anatomy):
    """Of attention and MLP of the second block."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        take_few_passes(monkeypatch)
        kinds = (*KINDS, *PASS_KINDS, *CONTRAST_KINDS)
        gradients = collect_gradients(anatomy, TOKENS, kinds, contrast=TOKENS.flip(1))
    *_, last = stream_blocks(anatomy, TOKENS, outputs="gram")
    layout = find_layouts(anatomy)[BLOCK]
    return [Evidence(part, last.outputs[part.output.name], gradients, DAMP) for part in layout.sublayers]


@pytest.fixture(scope="module")
def by_window(anatomy):
    """Gradients of each window's loss, and of each window's logit peaks, kept whole: two lists."""
    model = deepcopy(anatomy.model).requires_grad_(True)
    found = ([], [])
    for window in TOKENS:
        for kept, peaks in zip(found, (False, True), strict=True):
            model.zero_grad()
            scores = model(input_ids=window[None]).logits[0]
            (scores.amax(0).mean() if peaks else F.cross_entropy(scores[:-1], window[1:])).backward()
            kept.append({name: x.grad.double() for name, x in model.named_parameters() if x.grad is not None})
    return found


@pytest.fixture(scope="module")
def inputs(anatomy, evidence):
    """What the output projections see, a row a token."""
    seen = []
    hooks = [
        given.layout.output.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
        for given in evidence
    ]
    logits(anatomy.model)
    for hook in hooks:
        hook.remove()
    return [x.flatten(0, 1) for x in seen]


def owned(given, tensors):
    """For each unit the parts of a family of matrices, by the projection's name, that it owns; rows of units."""
    units = []
    for unit in range(given.layout.n_units):
        parts = []
        for placement in given.layout.placements:
            (width,) = placement.parts
            matrix = tensors[placement.linear.name]
            at = slice(unit * width, (unit + 1) * width)
            parts.append(matrix[at] if placement.axis == 0 else matrix[:, at].T)
        units.append(parts)
    return units


def weights_of(given):
    return {p.linear.name: p.linear.weight.double() for p in given.layout.placements}


def effects_of(given, gradients):
    """``w g`` of each window."""
    weights = weights_of(given)
    return [{name: w * grads[f"{name}.weight"] for name, w in weights.items()} for grads in gradients]


def mean_of(effects):
    return {name: torch.stack([x[name] for x in effects]).mean(0) for name in effects[0]}


def squares_of(effects):
    return {name: torch.stack([x[name] for x in effects]).square().mean(0) for name in effects[0]}


def score(name, given):
    return IMPORTANCES[name].function(given).double()


def summed(units, value):
    return torch.stack([sum(value(part) for part in parts) for parts in units])


# --- LLM-Pruner ---


def test_llm_pruner_by_hand(evidence, by_window):
    """Attentions and MLPs alike: the released mixed order does not run on attentions."""
    for given in evidence:
        effects = effects_of(given, by_window[0])
        first, second = mean_of(effects), squares_of(effects)
        mixed = {name: first[name] - second[name] / 2 for name in first}
        by_hand = {
            "llm_pruner_first": summed(owned(given, first), lambda x: x.abs().sum()),
            "llm_pruner_vector": summed(owned(given, first), lambda x: x.sum(1).abs().sum()),
            "llm_pruner_second": summed(owned(given, second), lambda x: x.sum()),
            "llm_pruner_mixed": summed(owned(given, mixed), lambda x: x.abs().sum()),
            "llm_pruner_l1": summed(owned(given, weights_of(given)), lambda x: x.abs().sum()),
            "llm_pruner_l2": summed(owned(given, weights_of(given)), lambda x: x.square().sum()),
        }
        for name, wanted in by_hand.items():
            assert torch.allclose(score(name, given), wanted, rtol=1e-4), name
        assert (by_hand["llm_pruner_vector"] < by_hand["llm_pruner_first"]).all()


def test_the_second_order_counts_every_window(evidence, by_window):
    """Torch-Pruning's Hessian keeps the squared gradient of the last sample alone."""
    given = evidence[1]
    last = summed(owned(given, squares_of(effects_of(given, by_window[0][-1:]))), lambda x: x.sum())
    second = score("llm_pruner_second", given)
    assert not torch.allclose(second, last, rtol=0.2)
    assert not torch.allclose(second, last / N_WINDOWS, rtol=0.2)


# --- NIRVANA, SAAP ---


def test_nirvana_by_hand(evidence, by_window):
    for given in evidence:
        effects = mean_of(effects_of(given, by_window[1]))
        wanted = summed(owned(given, effects), lambda x: x.abs().sum())
        assert torch.allclose(score("nirvana", given), wanted, rtol=1e-4)


def test_saap_by_hand(evidence, by_window):
    for given in evidence:
        effects = effects_of(given, by_window[0])
        lines = torch.stack(  # of each window, unit and row or column
            [torch.stack([torch.cat([x.sum(1) for x in unit]) for unit in owned(given, e)]) for e in effects]
        )
        coarse = lines.mean(0).abs().sum(1)
        coarse_noise = lines.var(0, correction=0).sum(1).mean()
        single = torch.stack(
            [
                torch.stack([torch.cat([x.flatten() for x in unit]) for unit in owned(given, e)])
                for e in effects
            ]
        )
        fine = (single.mean(0) - single.square().mean(0) / 2).abs().sum(1)
        fine_noise = single.var(0, correction=0).sum(1).mean()
        wanted = coarse / (2 * coarse_noise) + fine / (2 * fine_noise)
        assert torch.allclose(score("saap", given), wanted, rtol=1e-3)


def test_saap_of_one_window_is_finite(anatomy, evidence):
    one = collect_gradients(anatomy, TOKENS[:1], IMPORTANCES["saap"].gradients)
    given = Evidence(evidence[1].layout, None, one, DAMP)
    assert torch.isfinite(score("saap", given)).all()


# --- CFSP ---


def released_cfsp(given):
    """`three_w_one_wa` of the released code: each term is divided by the sum over its own channel."""
    gate, up, down = (p.linear.weight.double().abs() for p in given.layout.placements)
    norm = given.seen.norm.double()
    terms = (down * norm / (down * norm).sum(0), up.T / up.T.sum(0), gate.T / gate.T.sum(0))
    return sum(terms).mean(0) * norm


def test_cfsp_sees_weights_where_the_released_code_sees_norms_alone(evidence):
    given = evidence[1]
    norm = given.seen.norm.double()
    assert torch.allclose(released_cfsp(given) / norm, torch.tensor(3 / 32, dtype=torch.float64))
    ratio = score("cfsp", given) / norm
    assert float(ratio.max() / ratio.min()) > 1.5
    gate, up, down = (p.linear.weight.double().abs() for p in given.layout.placements)
    terms = (down * norm / (down * norm).sum(1, keepdim=True), (up / up.sum(0)).T, (gate / gate.sum(0)).T)
    assert torch.allclose(score("cfsp", given), sum(terms).mean(0) * norm, rtol=1e-4)


# --- second moments ---


def test_llm_bip_is_the_size_of_what_a_unit_adds(evidence, inputs):
    attention, mlp = evidence
    x, w = inputs[0], attention.weight.double()
    parts = torch.einsum("tuc,ouc->tuo", x.reshape(len(x), 4, -1), w.reshape(32, 4, -1))
    wanted = parts.square().sum(2).mean(0).sqrt()
    assert torch.allclose(score("llm_bip", attention), wanted, rtol=1e-4)
    wanted = inputs[1].abs().mean(0) * mlp.weight.double().norm(dim=0)
    assert torch.allclose(score("llm_bip", mlp), wanted, rtol=1e-4)


@pytest.mark.parametrize(("penalty", "kept"), [(1e-3, 0.9), (1.0, 0.5), (100.0, 0.1)])
def test_numerical_pruning_orders_as_newtons_method_at_every_sparsity(evidence, inputs, penalty, kept):
    for given, x in zip(evidence, inputs, strict=True):
        w, n = given.weight.double(), given.weight.shape[1]
        a = (w.T @ w) * (x.T @ x / len(x))
        a += DAMP * a.diagonal().mean() * torch.eye(n, dtype=torch.float64)
        hessian = a + penalty
        z = torch.rand(n, dtype=torch.float64)
        for _ in range(2):  # from any start; one step is exact
            z = z - torch.linalg.solve(hessian, a @ (z - 1) + penalty * (z.sum() - kept * n))
        wanted = z.reshape(given.layout.n_units, -1).mean(1)
        found = score("numerical", given)
        assert found.argsort().tolist() == wanted.argsort().tolist()
        assert torch.corrcoef(torch.stack([found, wanted]))[0, 1] > 1 - 1e-8


def test_greedy_output_scores_channels_by_the_error_after_a_refit(evidence, inputs):
    given, x = evidence[1], inputs[1]
    w, h = given.weight.double(), x.T @ x / len(x)
    h += DAMP * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    found = score("greedy_output", given)
    for channel in (0, 7, 31):
        others = [i for i in range(len(h)) if i != channel]
        fit = torch.linalg.solve(h[others][:, others], h[others][:, channel])  # of the channel by the others
        left = h[channel, channel] - h[channel, others] @ fit
        assert torch.isclose(found[channel], w[:, channel].square().sum() * left, rtol=1e-4)


def test_greedy_output_drops_the_smaller_one_of_the_most_alike_groups(evidence):
    """Groups 0 and 2 add nearly opposite vectors, 1 and 3 are less alike; by size alone 1 would go first."""
    generator = torch.Generator().manual_seed(0)
    layout = evidence[0].layout
    width = layout.unit_width
    outputs = torch.eye(4, dtype=torch.float64)
    outputs[0, 0] = 3.0
    outputs[2] = torch.tensor([-2.0, 0.0, 0.0, 0.1])
    outputs[3] = torch.tensor([0.0, 1.0, 0.0, 4.0])
    inputs = torch.randn(50, 1, generator=generator) * torch.ones(50, 4 * width)
    linear = deepcopy(layout.output.module)
    linear.weight.zero_()
    linear.weight[:4] = outputs.repeat_interleave(width, 0).T.float() / width
    seen = OutputStatistics.empty(4 * width, gram=True, device=linear.weight.device)
    seen.add(inputs[None])
    saved = layout.output.weight
    layout.output.point_to(linear.weight.data)
    try:
        given = Evidence(layout, seen, {}, DAMP)
        products = contributions(given) / inputs[:, 0].double().square().mean()
        assert torch.allclose(products, outputs @ outputs.T, atol=1e-5)
        assert score("greedy_output", given).tolist() == [0.625, 0.375, 0.125, 0.875]
    finally:
        layout.output.point_to(saved)


# --- every method ---

UNVERIFIED = {"saap", "cfsp", "llm_bip", "greedy_output", "mini_llm"}


def test_methods_known_by_abstracts_alone_say_so():
    """And so does the choice that makes CFSP's text work."""
    said = {
        name for name, row in IMPORTANCES.items() if "[INFER]" in (getattr(row.function, "__doc__", "") or "")
    }
    assert said == UNVERIFIED
    assert {name for name, row in CUT_REPAIRS.items() if "[INFER]" in (row.function.__doc__ or "")} == {
        "liar"
    }


@pytest.mark.parametrize("name", IMPORTANCES)
def test_every_importance_says_what_it_needs_and_needs_no_more(anatomy, evidence, name):
    row = IMPORTANCES[name]
    assert row.paper.startswith("https://")
    assert row.summary
    for given in evidence:
        seen = deepcopy(given.inputs) if row.needs != "nothing" else None
        if seen is not None and row.needs != "gram":
            seen.gram = None
        gradients = {kind: given.gradients[kind] for kind in row.gradients}
        lean = Evidence(given.layout, seen, gradients, DAMP)
        assert importance_order(name, lean).tolist() == importance_order(name, given).tolist()
    if row.gradients:
        kind, others = row.gradients[0], row.gradients[1:]
        without = Evidence(evidence[1].layout, None, {k: evidence[1].gradients[k] for k in others}, DAMP)
        with pytest.raises(KeyError, match=kind):
            row.function(without)


@pytest.mark.parametrize(
    "name",
    [
        "llm_pruner_mixed",
        "nirvana",
        "saap",
        "cfsp",
        "numerical",
        "greedy_output",
        "mini_llm",
        "bonsai",
        "bonsai_round",
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_a_model_is_cut_by_them(name, family, monkeypatch):
    take_few_passes(monkeypatch)
    anatomy = dissect(build(CONFIGS[family]))
    units = prune_structure(
        anatomy,
        [Kept(1, 20), Kept(1, 7)],
        importance=name,
        repair="liar",
        tokens=TOKENS,
        sequential=True,
    )
    assert [(len(x.kv_groups), len(x.channels)) for x in units] == [(1, 20), (1, 7)]
    assert torch.isfinite(logits(anatomy.model)).all()
