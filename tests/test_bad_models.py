"""Models that can't be pruned or measured: named in one line before anything is computed."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.pruners.models.discover import dissect
from secateur.pruners.models.usable import NotFiniteError, check_weights, check_windows
from secateur.search import app
from secateur.search.errors import UsageError
from tests.cut_models import MODELS, SIZES, small_tokenizer
from tests.mixtures import make_mixture

LONG = {"window": 128, "n_tokens": 256}
SHORT = {"window": 32, "n_tokens": 64}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def nan():
    model = MODELS["llama"]()
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    return model


def loud():
    """Logits beyond what fp16 can hold."""
    model = MODELS["llama"](tie_word_embeddings=False)
    model.lm_head.weight.data.fill_(300.0)
    model.model.norm.weight.data.fill_(300.0)
    return model


def with_parts():
    """An encoder and a decoder."""
    config = tf.T5Config(vocab_size=272, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return tf.T5ForConditionalGeneration(config)


def patched(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}

GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
TOWERS = {name: {"model_type": "llama", **SIZES} for name in ("text_config", "decoder")}

# name: model, changes of the config, arguments of `evaluate`, what is said
ROWS = {
    "an encoder-decoder": (with_parts, {}, SHORT, "a decoder-only model, got the encoder-decoder t5"),
    "no causal head, no such class": (
        lambda: tf.ViTModel(
            tf.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
        ),
        {},
        SHORT,
        "Expected a causal LM with a tokenizer",
    ),
    "no causal head, not saved": (
        lambda: tf.LlamaModel(MODELS["llama"](tie_word_embeddings=False).config),
        {},
        SHORT,
        "a model with a causal head, got the architecture LlamaModel",
    ),
    "an encoder": (
        lambda: tf.BertModel(tf.BertConfig(**BERT, num_attention_heads=4)),
        {},
        SHORT,
        "a model with a causal head, got the architecture BertModel",
    ),
    "FP8 with block scales": (MODELS["llama"], FP8, SHORT, "got a checkpoint quantised by fp8"),
    "GPTQ": (MODELS["llama"], GPTQ, SHORT, "got a checkpoint quantised by gptq"),
    "several language towers": (MODELS["llama"], TOWERS, SHORT, "Multiple valid text configs were found"),
    "NaN": (nan, {}, SHORT, r"infinity in 1 of the 1,536 of model.layers.2.mlp.up_proj.weight. Get"),
    "fewer ids than the tokenizer's": (
        lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 100})),
        {},
        SHORT,
        r"within the 100 rows .* got one of 259 tokens",
    ),
    "windows beyond learned positions": (
        MODELS["opt"],
        {},
        {**LONG, "allow_long_windows": True},
        "at most 64 tokens, the learned positions of the model, got 128",
    ),
    "windows beyond rotary positions": (
        MODELS["llama"],
        {},
        LONG,
        r"at most 64 tokens, the model's positions, got 128.*`allow_long_windows`",
    ),
    "too loud for fp16": (
        loud,
        {},
        {**SHORT, "dtype": "float16", "device": "cpu"},
        "logits of the dense model, got NaN or infinity in float16. Try bfloat16 or float32",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_it_is_named_in_one_line(name, tmp_path):
    make, changes, arguments, said = ROWS[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    if changes:
        patched(tmp_path, **changes)
    with pytest.raises(UsageError, match=said) as caught:
        app.evaluate(str(tmp_path), **arguments)
    assert "\n" not in str(caught.value)


def test_long_windows_are_measured_where_they_are_allowed(tmp_path):
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    found = app.evaluate(str(tmp_path), **LONG, allow_long_windows=True)
    assert found["window"] == 128
    assert 200 < found["perplexity"] < 300, "a random model of 272 tokens knows little"
    with pytest.raises(UsageError, match="at most 64 tokens, the model's positions, got 128"):
        app.open_session(settings_of(tmp_path))
    app.open_session(settings_of(tmp_path, allow_long_windows=True))


def settings_of(model, **changes):
    evaluator = {"window": 128, "calibration_tokens": 512, "fidelities": [128], "test_tokens": 256}
    return app.settings_from(
        {"model": str(model), "space": {"kind": "allocation"}, "evaluator": {**evaluator, **changes}}
    )


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    small_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"a whole model, got an adapter .*Merge it"):
        app.evaluate(str(tmp_path), **SHORT)


def test_several_language_towers_are_refused():
    model = MODELS["llama"]()

    def several(*args, **kwargs):
        raise ValueError("Multiple valid text configs were found")

    model.config.get_text_config = several
    with pytest.raises(ValueError, match="Expected one language tower, got LlamaConfig with several"):
        dissect(model)


def test_a_state_that_overflows_is_no_unknown_family():
    with pytest.raises(NotFiniteError, match=r"in float16. Try bfloat16 or float32"):
        dissect(loud().half().eval())


def test_weights_beyond_fp16_are_told_to_take_another_dtype():
    model = MODELS["llama"]()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.weight. Try bfloat16 or float32"):
        check_weights(model.half())


def test_windows_of_models_without_positions_are_as_long_as_one_likes():
    check_windows(MODELS["llama"](), 64, allow_long=False)
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    check_windows(bloom, 100_000, allow_long=False)


class Stubborn(torch.nn.Module):
    """Router that counts on six experts."""

    def __init__(self, router):
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k

    def forward(self, hidden):
        logits = torch.nn.functional.linear(hidden.flatten(0, -2), self.weight).reshape(-1, 6)
        weights, chosen = logits.softmax(-1).topk(self.top_k)
        return logits, weights, chosen


def test_a_router_that_can_t_be_cut_is_named_with_its_place():
    model = make_mixture("mixtral")
    for block in model.model.layers:
        block.mlp.gate = Stubborn(block.mlp.gate)
    with pytest.raises(
        ValueError, match=r"works with fewer experts, got .* \[at model.layers.0.mlp\]"
    ) as caught:
        dissect(model)
    assert "\n" not in str(caught.value)
