"""Exports of small models with zeros at random, and a tokenizer of words."""

from functools import cache

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.pruners.export.export import export_model
from secateur.pruners.export.manifest import UNSTRUCTURED, Manifest

SIZES = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))


@cache
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(95)} | {"[UNK]": 95}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def llama(*, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **SIZES,
    )
    return LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES))


def prune(model, sparsity=0.5):
    """Zeros in place, at random, in every projection; returns the manifest for it."""
    asked = {}
    for name, module in model.named_modules():
        if name.endswith(("_proj", "c_attn", "c_fc", "c_proj")):
            weight = module.weight.data
            dropped = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))
            weight.view(-1)[dropped[: round(sparsity * weight.numel())]] = 0.0
            asked[name] = sparsity
    return Manifest(
        parent="someone/small-model",
        fingerprint="f" * 64,
        method={"metric": "random"},
        candidate="0.5",
        asked=asked,
        calibration={"source": "docs", "tokens": 128, "sha256": "0" * 64},
        seeds={"search": 0},
        measured={"test:48": {"loss": 0.25, "params": 1000}},
        label=UNSTRUCTURED,
    )


def export(model, to, manifest, **others):
    return export_model(model, tokenizer(), to, manifest=manifest, check_tokens=TOKENS, **others)


def leftovers(directory):
    return [path.name for path in directory.iterdir()]
