"""Relevance of units, against propagation rule by rule; contextual pruning by mean activations; fairness of heads."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from secateur.pruners.calibration.gradients import collect_gradients
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.fairness import fairness_scores, losses_without, places_of
from secateur.pruners.structure.relevance import check_rules, relevances
from secateur.spaces.methods import IMPORTANCES
from tests.models import random_tokens, small_anatomy
from tests.structures import CONFIGS, build

TOKENS = random_tokens(2, 7)


def through_linear(inputs, weight, relevance):
    """Epsilon rule, epsilon 0: each output's relevance by the shares of its summands."""
    return inputs * ((relevance / (inputs @ weight.T)) @ weight)


def rotated(x, cosine, sine, *, back=False):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cosine - turned * sine if back else x * cosine + turned * sine


def normed(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def attention(block, x, cosine, sine):
    """Forward pass of the heads of a Llama's attention with groups of two: all values that rules need."""
    of = block.self_attn
    project = lambda linear, n: (x @ linear.weight.double().T).reshape(len(x), n, -1).transpose(0, 1)  # noqa: E731
    q, k, v = project(of.q_proj, 4), project(of.k_proj, 2), project(of.v_proj, 2)
    turned = rotated(q, cosine, sine), rotated(k, cosine, sine).repeat_interleave(2, 0)
    scores = turned[0] @ turned[1].transpose(1, 2) / q.shape[-1] ** 0.5
    unseen = torch.ones(len(x), len(x)).triu(1).bool()
    shares = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    values = v.repeat_interleave(2, 0)
    mixed = (shares @ values).transpose(0, 1).reshape(len(x), -1)
    return q, k, v, turned, scores.masked_fill(unseen, 0), shares, values, mixed


def back_through_attention(block, x, cosine, sine, relevance):
    """Relevance of the attention's input from that of its heads' outputs, and of nothing else."""
    q, k, _, (q_turned, k_turned), scores, shares, values, mixed = attention(block, x, cosine, sine)
    heads = lambda y: y.reshape(len(x), 4, -1).transpose(0, 1)  # noqa: E731
    of_output = heads(relevance / mixed)
    of_shares = 0.5 * shares * (of_output @ values.transpose(1, 2))
    of_values = 0.5 * values * (shares.transpose(1, 2) @ of_output)
    of_scores = scores * (
        of_shares - shares * of_shares.sum(-1, keepdim=True)
    )  # Taylor expansion of the softmax
    per_score = torch.where(scores == 0, 0, of_scores / scores) / q.shape[-1] ** 0.5
    of_q = 0.5 * q_turned * (per_score @ k_turned)
    of_k = 0.5 * k_turned * (per_score.transpose(1, 2) @ q_turned)
    of_q = q * rotated(of_q / q_turned, cosine, sine, back=True)  # linear, too
    of_k = k.repeat_interleave(2, 0) * rotated(of_k / k_turned, cosine, sine, back=True)
    total = torch.zeros_like(x)
    for linear, found in (("q_proj", of_q), ("k_proj", of_k), ("v_proj", of_values)):
        if linear != "q_proj":
            found = found.reshape(2, 2, *found.shape[1:]).sum(1)
        rows = found.transpose(0, 1).reshape(len(x), -1)
        total += through_linear(x, getattr(block.self_attn, linear).weight.double(), rows)
    return total


def by_rules(model, window):
    """Relevance of the inputs of o and down, by block: rule by rule, in fp64, without gradients."""
    embedded = model.model.embed_tokens.weight.double()[window]
    length = len(window)
    cosine, sine = (x[0].double() for x in model.model.rotary_emb(embedded, torch.arange(length)[None]))
    x, seen = embedded, []
    for block in model.model.layers:
        first = normed(x, block.input_layernorm.weight.double())
        mixed = attention(block, first, cosine, sine)[-1]
        after = x + mixed @ block.self_attn.o_proj.weight.double().T
        second = normed(after, block.post_attention_layernorm.weight.double())
        gate, up = (second @ getattr(block.mlp, n).weight.double().T for n in ("gate_proj", "up_proj"))
        inner = torch.nn.functional.silu(gate) * up
        below = after + inner @ block.mlp.down_proj.weight.double().T
        seen.append((x, first, mixed, after, second, inner, below))
        x = below
    head, last = model.lm_head.weight.double(), normed(x, model.model.norm.weight.double())
    relevance = torch.zeros_like(x)
    relevance[:-1] = last[:-1] * head[window[1:]]  # of the logit of the token that follows
    found = []
    for block, (x, first, mixed, after, second, inner, below) in zip(
        reversed(model.model.layers), reversed(seen), strict=True
    ):
        down = block.mlp.down_proj.weight.double()
        of_inner = through_linear(inner, down, relevance * (inner @ down.T) / below)
        relevance = relevance * after / below
        for name in ("gate_proj", "up_proj"):
            relevance = relevance + through_linear(
                second, getattr(block.mlp, name).weight.double(), of_inner / 2
            )
        out = block.self_attn.o_proj.weight.double()
        of_mixed = through_linear(mixed, out, relevance * (mixed @ out.T) / after)
        relevance = relevance * x / after + back_through_attention(block, first, cosine, sine, of_mixed)
        found.insert(0, (of_mixed.sum(0), of_inner.sum(0)))
    return found


def test_relevance_equals_propagation_rule_by_rule():
    anatomy = small_anatomy()
    found = relevances(anatomy, TOKENS)
    windows = [by_rules(anatomy.model, window) for window in TOKENS]
    for index in range(2):
        for place, name in enumerate(("self_attn.o_proj", "mlp.down_proj")):
            wanted = torch.stack([window[index][place] for window in windows]).mean(0)
            given = found[f"model.layers.{index}.{name}"].double()
            assert torch.allclose(given, wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max())), (
                index,
                name,
            )


def test_the_live_model_is_as_it_was():
    anatomy, reference = small_anatomy(), small_anatomy()
    relevances(anatomy, TOKENS)
    assert torch.equal(anatomy.model(input_ids=TOKENS).logits, reference.model(input_ids=TOKENS).logits)
    assert not any(x.requires_grad for x in anatomy.model.parameters())


def test_fused_projections_get_the_shares_of_their_parts():
    """GPT-NeoX, head by head, and GPT-2, one after the other: the values' share alone is a half."""
    for name in ("gpt_neox", "gpt2"):
        anatomy = dissect(build(CONFIGS[name]))
        from secateur.pruners.structure.relevance import _fused_shares

        (linear,) = (x for x in anatomy.blocks[0].linears if x.role == "qkv")
        shares = _fused_shares(anatomy)[linear.name]
        assert shares.shape == (linear.out_features,)
        assert int((shares == 0.5).sum()) == linear.out_features // 3
        half = (shares == 0.5).nonzero().flatten()
        third = linear.out_features // 3
        if name == "gpt2":
            assert half.tolist() == [*range(2 * third, 3 * third)]
        else:
            width = anatomy.blocks[0].head_dim
            assert half.tolist()[:width] == [*range(2 * width, 3 * width)]


def test_a_model_without_rules_is_refused_with_the_part():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4, conv_kernel=2)
    anatomy = dissect(MambaForCausalLM(config).eval())
    with pytest.raises(ValueError, match=r"rules of relevance, got one of recurrent at "):
        check_rules(anatomy)


def test_units_by_relevance_and_by_mean_activation():
    anatomy = small_anatomy()
    gradients = collect_gradients(anatomy, TOKENS, ("relevance",))
    first, *_ = stream_blocks(anatomy, TOKENS, outputs="moments")
    seen = []
    hook = (
        anatomy.blocks[0]
        .mixer("mlp")
        .linears[-1]
        .module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    )
    anatomy.model(input_ids=TOKENS)
    hook.remove()
    for part in find_layouts(anatomy)[0].sublayers:
        given = Evidence(part, first.outputs[part.output.name], gradients, 0.01)
        by_column = gradients["relevance"][part.output.name].reshape(part.n_units, -1).sum(1)
        assert torch.allclose(IMPORTANCES["relevance"].function(given), by_column)
        if part.kind == "mlp":
            assert torch.allclose(
                IMPORTANCES["mini_gpts"].function(given), seen[0].abs().mean((0, 1)), rtol=1e-4
            )


# --- fairness ---


def test_losses_without_a_group_are_those_of_a_model_without_it():
    anatomy = small_anatomy()
    attentions = [layout.sublayers[0] for layout in find_layouts(anatomy)]
    found = torch.stack([*losses_without(anatomy, attentions, TOKENS)])
    for block, layout in enumerate(attentions):
        for unit in range(layout.n_units):
            cut = small_anatomy()
            output = cut.blocks[block].linears[3]
            assert output.role == "o"
            output.weight[:, unit * layout.unit_width : (unit + 1) * layout.unit_width] = 0
            logits = cut.model(TOKENS).logits[:, :-1]
            wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
            assert float(found[block, unit]) == pytest.approx(float(wanted), rel=1e-5)


def test_heads_that_quality_needs_stay_and_of_the_others_the_most_biased_go():
    """By the released script: of ten heads, with gamma 0.3, seven may go, by the bias without them."""
    quality = torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6, 5, 5.5])
    bias = torch.tensor([0.5, 0, 0.1, 0, 0.9, 0, 0.2, 0.3, 0.8, 0.4])
    n_loose = 10 - int(10 * 0.3)
    threshold = quality.sort()[0][n_loose - 1]
    loose = [i for i in range(10) if quality[i] <= threshold]
    places = places_of(quality, bias)
    for n_gone in range(1, n_loose + 1):
        limit = sorted(float(bias[i]) for i in loose)[n_gone - 1]
        released = {i for i in loose if float(bias[i]) <= limit}
        assert {i for i in range(10) if places[i] < n_gone} == released
    assert {i for i in range(10) if places[i] >= n_loose} == {1, 3, 5}


def test_channels_go_behind_all_groups_and_the_second_text_decides():
    anatomy, others = small_anatomy(), random_tokens(3, 7, seed=4)
    found = fairness_scores(anatomy, TOKENS, others)
    groups = torch.cat([x for name, x in found.items() if name.endswith("o_proj")])
    assert sorted(groups.tolist()) == [0, 1, 2, 3]
    assert all(
        (x >= 4).all() and x.unique().numel() > 1 for name, x in found.items() if name.endswith("down_proj")
    )
    attentions = [layout.sublayers[0] for layout in find_layouts(anatomy)]
    quality, bias = (torch.cat([*losses_without(anatomy, attentions, x)]) for x in (TOKENS, others))
    assert torch.equal(groups, places_of(quality, -bias))
