"""Small cut models of several families, and their exports."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from secateur.pruners.export.export import export_structured
from secateur.pruners.export.manifest import UNSTRUCTURED, Manifest
from secateur.pruners.models.discover import dissect
from secateur.pruners.structure.pruning import prune_structure
from secateur.spaces.architecture.candidate import Kept

VOCABULARY = 272  # more than the tokenizer has
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    **IDS,
}
NO_GROUPS = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
OF_OPT = {k: v for k, v in NO_GROUPS.items() if k != "intermediate_size"} | {
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}
MODELS = {
    "llama": lambda **k: LlamaForCausalLM(LlamaConfig(**SIZES, **{"tie_word_embeddings": True, **k})),
    "mistral": lambda **k: MistralForCausalLM(MistralConfig(**SIZES, **k)),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**SIZES, **k)),
    "qwen3": lambda **k: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, **k)),
    "phi3": lambda **k: Phi3ForCausalLM(Phi3Config(**SIZES, **k)),
    "gemma2": lambda **k: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=8, **k)),
    "gpt2": lambda **k: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64, n_inner=48, **IDS)
    ),
    "opt": lambda **k: OPTForCausalLM(OPTConfig(**OF_OPT)),
    "gpt_neox": lambda **k: GPTNeoXForCausalLM(GPTNeoXConfig(**NO_GROUPS)),
}

# Blocks without attention, without MLP, and with fewer of both; in Gemma2 block 1 is the first with full attention.
MIXED = (Kept(4, 48), Kept(0, 32), Kept(1, 0), Kept(2, 17))
DROPPED = (Kept(4, 24), Kept(0, 0), Kept(4, 24), Kept(4, 24))


@cache
def small_tokenizer():
    """Of a kind that llama.cpp knows: digits apart, bytes joined by two rules."""
    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    vocabulary = {text: index for index, text in enumerate(letters)}
    made = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>")


TOKENS = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


def cut(family, kept, *, repair="none", **changes):
    """A random model, cut for good; larger weights than usual, so that errors show in the logits."""
    torch.manual_seed(0)
    model = MODELS[family](**changes).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    anatomy = dissect(model)
    sample = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    units = prune_structure(
        anatomy, kept, importance="magnitude", repair=repair, tokens=sample, sequential=True
    )
    return anatomy, units


def manifest(kept, form="hf"):
    return Manifest(
        parent="someone/small-model",
        fingerprint="f" * 64,
        method={"importance": "magnitude"},
        candidate="architecture:...",
        asked={},
        calibration={"text": "docs", "tokens": 32, "sha256": "0" * 64},
        seeds={"search": 0},
        measured={"test:48": {"kl": 0.25}},
        label=UNSTRUCTURED,
        format=form,
        kept=[{"kv_groups": block.kv_groups, "ffn": block.ffn} for block in kept],
    )


def save(family, kept, to, *, form="hf", repair="none", dtype=None, tokenizer=None, **changes):
    anatomy, units = cut(family, kept, repair=repair, **changes)
    report = export_structured(
        anatomy,
        tokenizer or small_tokenizer(),
        kept,
        manifest(kept, form),
        to,
        check_tokens=TOKENS,
        dtype=dtype,
        units=units,
    )
    return anatomy, report
