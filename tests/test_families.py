"""Anatomies of 2-layer models with random weights, one of each family, against the models themselves."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers as tf
from torch import nn

from secateur.pruners.models.anatomy import Heads
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.families import FAMILIES, NAMED_ALIKE
from secateur.pruners.models.shape import fixed_macs, model_shape, prunables
from tests.families import FAMILIES as TABLE
from tests.families import make
from tests.family_configs import WINDOW

GROUPED = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
OPT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}
NEOX = {key: value for key, value in GROUPED.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
QKV, FUSED, GATED = ("q", "k", "v", "o"), ("qkv", "o"), ("gate", "up", "down")

# name: config, roles of a block, key/value heads, width of a head
CASES = {
    "llama": (tf.LlamaConfig(**GROUPED), QKV + GATED, 2, 8),
    "llama-tied": (tf.LlamaConfig(**GROUPED, tie_word_embeddings=True), QKV + GATED, 2, 8),
    "mistral": (tf.MistralConfig(**GROUPED, sliding_window=3), QKV + GATED, 2, 8),
    "qwen2": (tf.Qwen2Config(**GROUPED), QKV + GATED, 2, 8),
    "qwen3": (tf.Qwen3Config(**GROUPED, head_dim=16), QKV + GATED, 2, 16),
    "gemma2": (
        tf.Gemma2Config(**GROUPED, head_dim=12, sliding_window=3, final_logit_softcapping=0.05),
        QKV + GATED,
        2,
        12,
    ),
    "phi3": (tf.Phi3Config(**GROUPED), FUSED + ("gate_up", "down"), 2, 8),
    "opt": (tf.OPTConfig(**OPT), QKV + ("up", "down"), 4, 8),
    "opt-projected": (
        tf.OPTConfig(**OPT | {"word_embed_proj_dim": 16}, do_layer_norm_before=False),
        QKV + ("up", "down"),
        4,
        8,
    ),
    "gpt2": (tf.GPT2Config(**GPT2), FUSED + ("up", "down"), 4, 8),
    "gpt_neox": (tf.GPTNeoXConfig(**NEOX), FUSED + ("up", "down"), 4, 8),
}


def build(config):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases, which start as ones and zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def models():
    return {name: build(config) for name, (config, *_) in CASES.items()}


def run(model, anatomy, tokens):
    """The last block's output and the logits, as the model itself computes them."""
    seen = []
    handle = anatomy.blocks[-1].module.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    handle.remove()
    (output,) = seen
    return (output[0] if isinstance(output, tuple) else output), logits


def test_every_family_that_is_promised_is_tested():
    assert {config.model_type for config, *_ in CASES.values()} == set(NAMED_ALIKE)
    assert sorted({kind for kind, _, refusal in TABLE.values() if not refusal}) == list(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_blocks_and_projections_are_found(models, name):
    config, roles, n_kv_heads, head_dim = CASES[name]
    anatomy = dissect(models[name])
    modules = dict(models[name].named_modules())
    assert (anatomy.family, anatomy.width, anatomy.vocab_size) == (config.model_type, 32, 97)
    assert [block.index for block in anatomy.blocks] == [0, 1]
    for block in anatomy.blocks:
        assert tuple(linear.role for linear in block.linears) == roles
        assert (block.n_heads, block.n_kv_heads, block.head_dim, block.ffn_width) == (
            4,
            n_kv_heads,
            head_dim,
            48,
        )
        assert modules[block.name] is block.module
        assert all(modules[linear.name] is linear.module for linear in block.linears)
        assert all(linear.block == block.index for linear in block.linears)
    assert len({linear.name for linear in anatomy.linears}) == 2 * len(roles)


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_of_a_block_is_one_of_its_projections_and_every_norm_is_named(models, name):
    anatomy = dissect(models[name])
    for block in anatomy.blocks:
        matrices = sum(value.numel() for value in block.module.parameters() if value.ndim > 1)
        assert sum(linear.n_weights for linear in block.linears) == matrices
        owners = {
            path.rpartition(".")[0] for path, value in block.module.named_parameters() if value.ndim == 1
        }
        linears = {linear.name for linear in block.linears}
        assert {f"{block.name}.{owner}" for owner in owners} - linears == set(block.norms)


@pytest.mark.parametrize("name", CASES)
def test_tail_and_logits_are_the_models_own(models, name):
    model = models[name]
    anatomy = dissect(model)
    hidden, logits = run(
        model, anatomy, torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    )
    with torch.no_grad():
        again = anatomy.logits(anatomy.tail(hidden))
    assert torch.equal(again, logits)
    assert hidden.shape == (2, 7, anatomy.width)


def test_a_soft_cap_matters_in_the_test_above(models):
    anatomy = dissect(models["gemma2"])
    hidden, logits = run(models["gemma2"], anatomy, torch.arange(7)[None])
    with torch.no_grad():
        assert not torch.allclose(anatomy.head(anatomy.tail(hidden)), logits, rtol=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_a_linears_weight_is_out_by_in_and_computes_what_the_module_does(models, name):
    for linear in dissect(models[name]).linears:
        inputs = torch.randn(3, linear.in_features)
        with torch.no_grad():
            expected = nn.functional.linear(inputs, linear.weight, linear.module.bias)
            assert torch.allclose(linear.module(inputs), expected, atol=1e-5)


def test_pointing_a_transposed_linear_to_zeros_shares_their_memory():
    linear = next(dissect(build(CASES["gpt2"][0])).linears)
    zeros = torch.zeros_like(linear.weight)
    linear.point_to(zeros)
    assert linear.transposed
    assert linear.module.weight.data_ptr() == zeros.data_ptr()
    assert linear.module.weight.shape == (32, 96)


def test_final_norm_is_named_where_there_is_one(models):
    assert dissect(models["llama"]).final_norm == "model.norm"
    assert dissect(models["opt"]).final_norm == "model.decoder.final_layer_norm"
    assert dissect(models["opt-projected"]).final_norm == ""
    assert [type(module).__name__ for module in dissect(models["opt-projected"]).tail] == ["Linear"]


def test_the_model_is_left_as_it_was():
    model = build(CASES["llama"][0]).train()
    dissect(model)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BERT = SMALL | {"intermediate_size": 48, "num_attention_heads": 4}
UNKNOWN = {
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), "decoder-only"),
    "t5-encoder": (lambda: tf.T5EncoderModel(tf.T5Config(**T5, is_encoder_decoder=False)), "head"),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)), "causal LM"),
    "no blocks": (lambda: nn.Linear(2, 2), "config"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_family_is_an_error_of_one_line_that_names_what_was_found(name):
    make, found = UNKNOWN[name]
    with pytest.raises(ValueError, match=found) as caught:
        dissect(make())
    message = str(caught.value)
    assert "\n" not in message
    assert "Expected" in message
    assert message.endswith("Those known to work: secateur list families.")


def test_a_matrix_of_no_mixer_is_named_and_no_projection():
    model = build(CASES["llama"][0])
    model.model.layers[1].adapter = nn.Linear(32, 4)
    model.model.layers[0].self_attn.table = nn.Parameter(torch.zeros(3, 4))
    anatomy = dissect(model)
    assert [block.unknown for block in anatomy.blocks] == [("self_attn.table",), ("adapter.weight",)]
    assert len(list(anatomy.linears)) == 14
    assert [block.unknown for block in dissect(build(CASES["llama"][0])).blocks] == [(), ()]


def test_a_projection_that_is_missing_is_named():
    model = build(CASES["llama"][0])
    del model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=r"got gate\+down \[at model.layers.0\]"):
        dissect(model)


def test_shapes_that_contradict_the_config_are_an_error():
    model = build(CASES["llama"][0])
    model.model.layers[1].self_attn.k_proj = nn.Linear(32, 8, bias=False)
    with pytest.raises(ValueError, match=r"got 8 x 32 \[at model.layers.1.self_attn.k_proj\]"):
        dissect(model)


def test_a_model_that_changes_its_logits_otherwise_is_an_error():
    class Shifted(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 1.0
            return output

    model = Shifted(CASES["llama"][0]).eval()
    with pytest.raises(ValueError, match="LlamaRMSNorm before the head, which gives other logits"):
        dissect(model)


def test_a_block_list_of_another_length_is_an_error():
    model = build(CASES["llama"][0])
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"one list of 3 alike blocks .* found none in LlamaForCausalLM"):
        dissect(model)


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_bytes_add_up(models, name):
    model = models[name]
    anatomy = dissect(model)
    shape = model_shape(anatomy, 1, 4, blocks=False)
    assert shape.n_params == sum(parameter.numel() for parameter in model.parameters())
    assert shape.n_params > n_prunable(anatomy)
    assert shape.with_zeros(0, 1)["size_bytes"] == 4 * shape.n_params
    half = model_shape(dissect(build(CASES[name][0]).to(torch.bfloat16)), 1, 2, blocks=False)
    assert half.with_zeros(0, 1)["size_bytes"] == 2 * shape.n_params
    assert half.kv_bytes_per_token == shape.kv_bytes_per_token // 2


def n_prunable(anatomy):
    return sum(linear.n_weights for linear in prunables(anatomy))


def test_a_tied_head_is_counted_once_as_parameters_and_still_computed():
    tied, untied = (dissect(build(CASES[name][0])) for name in ("llama-tied", "llama"))
    n_tied, n_untied = (model_shape(x, 1, 4, blocks=False).n_params for x in (tied, untied))
    assert n_untied - n_tied == 97 * 32
    assert fixed_macs(untied) == fixed_macs(tied) == 97 * 32


def test_costs_of_a_llama_by_hand(models):
    anatomy = dissect(models["llama"])
    shape = model_shape(anatomy, 10, 4, blocks=False)
    block = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48
    assert n_prunable(anatomy) == 2 * block
    assert shape.n_params - n_prunable(anatomy) == 2 * 97 * 32 + 5 * 32
    assert shape.macs_per_token == 2 * block + 97 * 32 + 2 * (2 * 4 * 8 * 10)
    assert shape.kv_bytes_per_token == 2 * (2 * 2 * 8) * 4


def test_sliding_windows_bound_attention_where_the_family_has_them(models):
    windows = {
        name: [block.window for block in dissect(models[name]).blocks]
        for name in ("llama", "mistral", "qwen2", "gemma2")
    }
    assert windows == {"llama": [None] * 2, "mistral": [3, 3], "qwen2": [None] * 2, "gemma2": [3, None]}
    anatomy = dissect(models["gemma2"])
    at_ten, at_three = (model_shape(anatomy, context, 4, blocks=False) for context in (10, 3))
    assert at_ten.macs_per_token - at_three.macs_per_token == 2 * 4 * 12 * 7  # the full block alone
    assert [block.attended(10) for block in anatomy.blocks] == [3, 10]


def test_a_projection_outside_of_the_blocks_is_computed_for_each_token(models):
    assert fixed_macs(dissect(models["opt-projected"])) == 97 * 16 + 2 * 16 * 32


def test_a_shape_holds_plain_numbers_and_compares_by_value(models):
    shapes = [model_shape(dissect(models["phi3"]), 8, 4) for _ in range(2)]
    assert shapes[0] == shapes[1]
    assert hash(model_shape(dissect(models["gpt2"]), 8, 4))


def test_windows_of_local_and_chunked_attention_bound_its_costs():
    """GPT-Neo's local blocks, Llama 4's chunks, RecurrentGemma's attention: a token attends to no more."""
    windows = {
        "gpt_neo": [None, WINDOW],
        "llama4, dense": [WINDOW, WINDOW, WINDOW, None],
        "recurrent_gemma": [None, WINDOW],
        "gemma3 text": [WINDOW, None],
        "gemma3 with images": [WINDOW, None],
    }
    for name, wanted in windows.items():
        anatomy = dissect(make(name))
        assert [block.window for block in anatomy.blocks] == wanted, name
        at_window, at_more = (
            model_shape(anatomy, n, 4, blocks=False).macs_per_token for n in (WINDOW, WINDOW + 10)
        )
        full = sum(m.score_macs for b in anatomy.blocks if b.window is None for m in b.mixers)
        assert at_more - at_window == 10 * full, name
        assert (full > 0) == (name != "recurrent_gemma")


def test_costs_of_mixers_of_other_kinds_by_hand():
    latent = dissect(make("deepseek_v3, dense")).blocks[0].mixers[0]
    assert (latent.kind, latent.heads) == ("attention", Heads(4, 4, width=8, query_rows=16, kv_rows=16))
    assert latent.score_macs == 4 * (16 + 8), "queries and keys of 16, values of 8, four heads"
    assert latent.cache_width == 4 * (16 + 8)
    state = dissect(make("mamba")).blocks[0].mixers[0]
    assert (state.kind, state.score_macs, state.cache_width) == ("recurrent", 0, 0)
    gated = dissect(make("qwen3_5 text")).blocks[1].mixers[0]
    assert (gated.score_macs, gated.cache_width) == (2 * 4 * 8, 2 * 2 * 8)
