"""Structured models in GGUF files, read back, and by llama.cpp itself where it is installed."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from secateur.pruners.export import gguf_file
from secateur.pruners.export.export_check import ExportError
from secateur.pruners.export.gguf_check import GgufModel
from secateur.pruners.export.manifest import MANIFEST
from tests.cut_models import DROPPED, MIXED, TOKENS, save, small_tokenizer


@pytest.mark.parametrize(
    ("family", "kept", "arch"),
    [("llama", MIXED, "deci"), ("mistral", DROPPED, "llama")],
    ids=["different", "uniform"],
)
def test_gguf_files_hold_the_model(family, kept, arch, tmp_path):
    _, report = save(family, kept, tmp_path / "out", form="gguf")
    assert {path.name for path in report.directory.iterdir()} == {"model.gguf", "README.md", MANIFEST}
    assert report.comparison.logit_error <= 1e-5
    read = GgufModel(report.directory / "model.gguf")
    assert read.arch == arch
    widths = read.fields[f"{arch}.feed_forward_length"]
    assert widths == (
        [48, 32, 32, 17] if arch == "deci" else 24
    )  # the MLP that is gone: 32 channels of zeros
    assert report.manifest.parameters["saved"] < report.manifest.parameters["parent"]


def test_gguf_files_hold_scaled_rotary_embeddings_biases_and_half_precision(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    settings = {"form": "gguf", "repair": "bias", "dtype": torch.float16, "rope_parameters": rope}
    _, report = save("llama", MIXED, tmp_path / "out", **settings)
    read = GgufModel(report.directory / "model.gguf")
    assert {"rope_freqs.weight", "blk.3.attn_output.bias", "blk.3.ffn_down.bias"} <= read.tensors.keys()
    assert 1e-6 < report.comparison.logit_error <= report.comparison.logit_tolerance == 1e-2


def test_a_gguf_file_with_another_model_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "_turned", lambda weight, head_dim: weight)
    with pytest.raises(ExportError, match="Expected logits within"):
        save("llama", MIXED, tmp_path / "out", form="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "activation silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary embedding"),
    ],
)
def test_models_that_gguf_cannot_carry_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save("llama", MIXED, tmp_path / "out", form="gguf", **changes)
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_llama_cpp_does_not_know_are_refused(tmp_path):
    parts = json.loads(small_tokenizer().backend_tokenizer.to_str())
    parts["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    other = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"known to llama.cpp .*smollm.*got Whitespace \+ Digits"):
        save("llama", MIXED, tmp_path / "out", form="gguf", tokenizer=other)


@pytest.mark.parametrize(("family", "kept"), [("llama", MIXED), ("mistral", DROPPED)])
def test_llama_cpp_generates_what_the_model_does(family, kept, tmp_path):
    llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp (pip install xllamacpp) is not installed")
    anatomy, report = save(family, kept, tmp_path / "out", form="gguf")
    settings = llama_cpp.CommonParams()
    settings.model.path = str(report.directory / "model.gguf")
    settings.n_ctx, settings.cpuparams.n_threads, settings.n_parallel, settings.warmup = 64, 1, 1, False
    server = llama_cpp.Server(settings)

    def first(prompt):
        asked = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": 5, "cache_prompt": False}
        found = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {token["id"]: token["logprob"] for token in found}

    text = "The value of 12 objects, isn't it?"
    for prompt, ids in (
        (TOKENS[0].tolist(), TOKENS[0].tolist()),
        (text, small_tokenizer()(text)["input_ids"]),
    ):
        wanted = anatomy.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for token, value in first(prompt).items():
            assert abs(float(wanted[token]) - value) < 0.02  # its cache holds half precision
