"""Small random models of the families that transformers has: their configs, and models of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import MixtureLayout, SublayerLayout
from secateur.spaces.architecture.candidate import Kept
from tests.family_configs import ALTERNATING, OTHERS, REFUSED, VOCABULARY, WINDOW

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_SLIDING = {"sliding_window": WINDOW}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

PLAIN: dict[str, tuple[str, dict[str, Any], str]] = {
    # name: model type, what its config has beside or without (None) the common values, why units are refused ("": cut)
    "llama": ("llama", {}, ""),
    "mistral": ("mistral", _SLIDING, ""),
    "ministral": ("ministral", ALTERNATING, ""),
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **_SLIDING}, ""),
    "qwen3": ("qwen3", {}, ""),
    "gemma": ("gemma", {}, ""),
    "gemma2": ("gemma2", {**_SLIDING, "query_pre_attn_scalar": 8}, ""),
    "gemma3 text": ("gemma3_text", {**ALTERNATING, "query_pre_attn_scalar": 8}, ""),
    "gemma3 with images": ("gemma3", {}, ""),
    "gemma4 text": (
        "gemma4_text",
        {**ALTERNATING, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 16},
        "",
    ),
    "vaultgemma": ("vaultgemma", {**ALTERNATING, "query_pre_attn_scalar": 8}, ""),
    "phi": ("phi", {}, ""),
    "phi3": ("phi3", _SLIDING, ""),
    "olmo": ("olmo", {}, ""),
    "olmo2": ("olmo2", {}, ""),
    "olmo3": ("olmo3", _SLIDING, ""),
    "granite": (
        "granite",
        {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
        "",
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}, ""),
    "cohere": ("cohere", {"logit_scale": 0.0625}, ""),
    "cohere2": ("cohere2", {**ALTERNATING, "logit_scale": 0.25}, ""),
    "glm": ("glm", {}, ""),
    "glm4": ("glm4", {}, ""),
    "exaone4": ("exaone4", {**_SLIDING, "sliding_window_pattern": 2}, ""),
    "nemotron": ("nemotron", {}, ""),
    "starcoder2": ("starcoder2", _SLIDING, ""),
    "stablelm": ("stablelm", {}, ""),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}, ""),
    "seed_oss": ("seed_oss", {}, ""),
    "ernie4_5": ("ernie4_5", {}, ""),
    "hunyuan": ("hunyuan_v1_dense", {}, ""),
    "arcee": ("arcee", {}, ""),
    "helium": ("helium", {}, ""),
    "apertus": ("apertus", {}, ""),
    "nanochat": ("nanochat", {}, ""),
    "cwm": ("cwm", ALTERNATING, ""),
    "ministral3": ("ministral3", {}, ""),
    "jais2": ("jais2", {}, ""),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 4.0}, ""),
    "llama4, dense": (
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": WINDOW,
            "moe_layers": [],
        },
        "",
    ),
    "bitnet": ("bitnet", {}, ""),
    "diffllama": ("diffllama", {}, ""),
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}, ""),
    "opt, norms behind": (
        "opt",
        {"word_embed_proj_dim": 16, "ffn_dim": 48, "do_layer_norm_before": False, "num_hidden_layers": 3},
        "",
    ),
    "gpt2": ("gpt2", _GPT2 | _ENDS, ""),
    "gpt_bigcode": ("gpt_bigcode", _GPT2 | _ENDS, ""),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            **_ENDS,
        },
        "",
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}, ""),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4, **_ENDS}, ""),
    "falcon": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "ffn_hidden_size": 48}, ""),
    "falcon, new": (
        "falcon",
        {"multi_query": False, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
        "",
    ),
    "persimmon": ("persimmon", {}, ""),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_ENDS},
        "",
    ),
    "mpt": (
        "mpt",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 128,
            "expansion_ratio": 2,
        },
        "",
    ),
}
"""Families of attention with q, k, v and o, and an MLP; the others have latent attention, experts, or are hybrids."""

FAMILIES = PLAIN | OTHERS

# Families whose configs know none of the common values.
_OWN_NAMES = ("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "bloom", "mpt", "mamba", "mamba2", "xlstm")
_WITHOUT = {
    "falcon": ("head_dim", "intermediate_size", "num_key_value_heads"),
    "gpt_neox": ("num_key_value_heads", "head_dim"),
    "opt": ("num_key_value_heads", "head_dim", "intermediate_size"),
    "persimmon": ("num_key_value_heads", "head_dim"),
}


def make(name: str) -> Any:
    """A random model of a family, in evaluation mode: norms and biases, which start alike, are random too."""
    kind, own, _ = (FAMILIES | REFUSED)[name]
    if kind == "gemma3":
        config = _with_images()
    else:
        common = {} if kind in _OWN_NAMES else _COMMON
        values = {key: x for key, x in common.items() if key not in _WITHOUT.get(kind, ())}
        config = CONFIG_MAPPING[kind](**values | own)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "A_log" not in path:
                parameter.normal_(0, 0.15)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # as some families have it whenever they are loaded
    return model.eval().requires_grad_(False)


def _with_images() -> Any:
    """Config of Gemma 3 with a vision tower."""
    text = {**_COMMON, **FAMILIES["gemma3 text"][1], "model_type": "gemma3_text"}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    return CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


def some_of_each(anatomy: Anatomy) -> list[Kept]:
    """Fewer units in the first block, the last one without what mixes its tokens, all but a few in the others."""
    found: list[Kept] = []
    for layout in find_layouts(anatomy, experts=True):
        attention, mlp, index = layout.attention, layout.mlp, layout.block.index
        few = index == 0 or (layout.block.n_heads and index < len(anatomy.blocks) - 1)
        groups = queries = ffn = 0
        if attention is not None:
            groups = max(1, attention.n_units // 2 if few and not attention.rigid else attention.n_units)
            queries = attention.heads_per_group - 1 if attention.splits and few else 0
        if mlp is not None:
            ffn = _fewer(mlp, 20 if index == 0 else 30)
        found.append(Kept(groups, ffn, queries))
    if mlp is None or attention is None:
        return [*found[:-1], Kept(0, 0)]
    return [*found[:-1], Kept(0, _fewer(mlp, 17))]


def _fewer(part: SublayerLayout | MixtureLayout, most: int) -> int:
    """Fewer units than all, or all where fewer can't be."""
    if isinstance(part, MixtureLayout):
        return part.n_units - part.mixture.n_groups
    return part.n_units if part.rigid else most
