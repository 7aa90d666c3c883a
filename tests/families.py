"""Small random models of the families that transformers has: their configs, and what each can be pruned by.

    python -m tests.families

prints the table of docs/reference/families.md, which `test_all_families` holds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from secateur.pruners.export.stock import stock_hidden
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, MixtureLayout, SublayerLayout
from secateur.pruners.models.stream_axes import stream_axes
from secateur.spaces.architecture.candidate import Kept
from tests.mixtures import MIXTURES

VOCABULARY = 97
WINDOW = 8
"""Sliding windows and chunks; the tests' texts are longer."""

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
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_SLIDING = {"sliding_window": WINDOW}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    # name: model type, what its config has beside or without (None) the common values, why units are refused ("": cut)
    "llama": ("llama", {}, ""),
    "mistral": ("mistral", _SLIDING, ""),
    "ministral": ("ministral", _ALTERNATING, ""),
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **_SLIDING}, ""),
    "qwen3": ("qwen3", {}, ""),
    "gemma": ("gemma", {}, ""),
    "gemma2": ("gemma2", {**_SLIDING, "query_pre_attn_scalar": 8}, ""),
    "gemma3 text": ("gemma3_text", {**_ALTERNATING, "query_pre_attn_scalar": 8}, ""),
    "gemma3 with images": ("gemma3", {}, ""),
    "gemma4 text": (
        "gemma4_text",
        {**_ALTERNATING, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 16},
        "",
    ),
    "vaultgemma": ("vaultgemma", {**_ALTERNATING, "query_pre_attn_scalar": 8}, ""),
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
    "cohere2": ("cohere2", {**_ALTERNATING, "logit_scale": 0.25}, ""),
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
    "cwm": ("cwm", _ALTERNATING, ""),
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
    "deepseek_v3, dense": (
        "deepseek_v3",
        {**_LATENT, "first_k_dense_replace": 2},
        "",
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **_LATENT,
            **_EXPERTS,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
        "",
    ),
    "minicpm3": ("minicpm3", _LATENT, ""),
    "youtu": ("youtu", _LATENT, ""),
    "mamba": ("mamba", _MAMBA, ""),
    "mamba2": ("mamba2", {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1}, ""),
    "falcon_h1": (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "",
    ),
    "bamba": ("bamba", {"attn_layer_indices": [1], **_STATES}, ""),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_multiple_of": 16},
        "",
    ),
    "jamba": (
        "jamba",
        {
            "num_hidden_layers": 4,
            **_EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        "",
    ),
    "granitemoehybrid, dense": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 48,
            **_STATES,
        },
        "",
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 24, **_EXPERTS, **_STATES},
        "",
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention"], **_EXPERTS, "num_dense_layers": 1},
        "",
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 1,
            **_EXPERTS,
            **_DELTA,
        },
        "",
    ),
    "minimax": (
        "minimax",
        {"layer_types": ["linear_attention", "full_attention"], "block_size": 8, **_EXPERTS},
        "",
    ),
    "olmo_hybrid": ("olmo_hybrid", {"layer_types": ["linear_attention", "full_attention"], **_DELTA}, ""),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        "",
    ),
    "qwen3_5 text": (
        "qwen3_5_text",
        {"layer_types": ["linear_attention", "full_attention"], **_DELTA},
        "",
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"attention_window_size": WINDOW, "lru_width": 32, "block_types": ["recurrent", "attention"]},
        "",
    ),
    "xlstm": (
        "xlstm",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,  # its caches take the widths of heads from it, rounded up to 64
            "embedding_dim": 64,
            "qk_dim_factor": 1.0,
            "num_hidden_layers": 2,
            "num_blocks": 2,
            "num_heads": 4,
            "chunk_size": 8,
        },
        "",
    ),
    **{
        f"{name}, groups" if name == "deepseek_v2" else name: (kind, own, "")
        for name, (kind, own) in MIXTURES.items()
    },
    "glm4_moe": ("glm4_moe", {**_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1}, ""),
    "dots1": (
        "dots1",
        {**_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
        "",
    ),
    "hunyuan_moe": ("hunyuan_v1_moe", {**_EXPERTS, "moe_topk": 2, "num_shared_expert": 1}, ""),
}

REFUSED = {
    # name: model type, config, reason
    "jetmoe": ("jetmoe", {"kv_channels": 8, **_EXPERTS}, "output projections that are understood"),
    "zamba2": (
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_hidden_layers": 4,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "num_mem_blocks": 1,
            "mamba_expand": 2,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "attention_hidden_size": 64,
        },
        "which share",
    ),
    "gemma3n text": (
        "gemma3n_text",
        {
            **_ALTERNATING,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
        "other logits than the model's",
    ),
    "gemma4, shared keys": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 8,
        },
        r"got q\+o",
    ),
}

FEWER_HEADS = (
    *(
        "stablelm",
        "stablelm, parallel",
        "helium",
        "gpt_neo",
        "gpt_neox",
        "falcon",
        "falcon, new",
        "persimmon",
        "opt",
        "gpt2",
        "gptj",
    ),
)
"""Families whose stock class takes the width of a head from those of the stream and of all heads."""

WHOLE_GROUPS = ("gpt_bigcode",)
"""Families with grouped queries whose attention takes their number from the width of the stream."""

_INNER = "mixers whose inner width follows the hidden width"
_HEADS = "the width of all heads follows it"
NO_WIDTHS = {
    "gemma3 with images": "another tower, which writes into the stream of the language tower",
    "opt, norms behind": "no norm behind the last block",
    "bloom": "a norm behind the embedding",
    **dict.fromkeys(("lfm2", "lfm2_moe", "xlstm"), _INNER),
    **dict.fromkeys(("bitnet", "gpt_bigcode", "mpt", "recurrent_gemma", "olmoe"), _HEADS),
}
"""Families whose hidden width can't be cut, with the reason."""

HALF_WIDTHS = ("mamba2", "bamba", "jamba", "granitemoehybrid", "granitemoehybrid, dense")
"""Families whose configs give the inner width of recurrent mixers as a whole multiple of the hidden one."""

HELD_WIDTHS = tuple(name for name in FAMILIES if name not in (*NO_WIDTHS, *FEWER_HEADS))
"""Families whose stock class holds fewer hidden channels with heads of the same width."""

PLAIN = tuple(FAMILIES)[: tuple(FAMILIES).index("deepseek_v3, dense")]
"""Families of attention with q, k, v and o, and an MLP; the others have latent attention, experts, or are hybrids."""

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


WHOLE = {
    "attention": "attention, whose heads depend on each other,",
    "recurrent": "recurrent mixers",
    "mlp": "MLPs, whose channels depend on each other,",
}
"""What can only be kept or removed as a whole."""

BY_PLACE = ("bloom", "mpt")
"""Families whose heads weigh distances by slopes that follow from their places and number (ALiBi)."""

WHY = {
    "other logits than the model's": "refused: more than modules, a factor and a soft cap between blocks and logits",
    "output projections that are understood": "refused: experts in attention, whose queries a router chooses",
    "which share": "refused: blocks share weights",
    r"got q\+o": "refused: blocks read the keys of others",
}
"""Reasons in words, by what errors match."""

HEADER = """| family | blocks | weights: allocation, formula, recipes | units: architecture, recipes | experts | \
query heads | hidden width |
|---|---|---|---|---|---|---|"""


def row(name: str, anatomy: Anatomy | None) -> str:
    """Line of the table; None for an anatomy that is refused."""
    kind, _, refusal = (FAMILIES | REFUSED)[name]
    family = f"{name} (`{kind}`)"
    if anatomy is None:
        return f"| {family} | | {WHY[refusal]} | refused | refused | refused | refused |"
    blocks = dict.fromkeys(" + ".join(mixer.kind for mixer in block.mixers) for block in anatomy.blocks)
    if refusal:
        units, further = WHY[refusal], "refused | refused | refused"
    else:
        layouts = find_layouts(anatomy, experts=True)
        units = _units(anatomy, layouts)
        further = f"{_experts(layouts)} | {_query_heads(name, layouts)} | {_hidden(anatomy, layouts)}"
    return f"| {family} | {'; '.join(blocks)} | works | {units} | {further} |"


def _units(anatomy: Anatomy, layouts: Sequence[BlockLayout]) -> str:
    """Units that can be cut, and parts that are kept or removed as a whole."""
    whole = {
        part.output.sublayer
        for layout in layouts
        for part in layout.parts
        if part.kind != "experts" and part.rigid
    }
    kinds = [WHOLE[kind] for kind in WHOLE if kind in whole]
    if anatomy.family in BY_PLACE:
        kinds = ["attention, whose heads depend on their places (ALiBi),"]
    return f"works; {' and '.join(kinds)} as a whole" if kinds else "works"


def _query_heads(name: str, layouts: Sequence[BlockLayout]) -> str:
    attentions = [x.attention for x in layouts if x.attention and x.block.mixer("attention")]
    if not attentions:
        return "refused: no attention"
    if not any(x.splits for x in attentions) and name not in WHOLE_GROUPS:
        if any(x.rigid for x in attentions):
            return "refused: no heads that are independent"
        return "refused: each has a KV head of its own"
    return "refused: their number follows the hidden width" if name in WHOLE_GROUPS else "works"


def _hidden(anatomy: Anatomy, layouts: Sequence[BlockLayout]) -> str:
    try:
        stream_axes(anatomy)
    except ValueError as error:
        return f"refused: {str(error).partition(' with ')[2].removesuffix('.')}"
    splits = any(x.attention and x.attention.splits for x in layouts)
    if stock_hidden(anatomy, anatomy.width // 4 * 3, groups=False, queries=False):
        return "works"
    half = anatomy.width // 2
    if stock_hidden(anatomy, half, groups=False, queries=False):
        return "half of it alone: the inner width of recurrent mixers is a whole multiple"
    if stock_hidden(anatomy, half, groups=True, queries=splits):
        return "beside fewer heads alone: their width follows it"
    return f"refused: {_HEADS}"


def _experts(layouts: Sequence[BlockLayout]) -> str:
    """Parts of mixtures that can be cut."""
    mixtures = [x.mlp for x in layouts if isinstance(x.mlp, MixtureLayout)]
    if not mixtures:
        return ""
    groups = max(x.mixture.n_groups for x in mixtures)
    limited = f" (as many of each of {groups} groups)" if groups > 1 else ""
    shared = "; channels of shared ones" if any(x.shared for x in mixtures) else ""
    return f"numbers{limited} and channels{shared}"


if __name__ == "__main__":
    rows = [row(each, dissect(make(each))) for each in FAMILIES] + [row(each, None) for each in REFUSED]
    sys.stdout.write("\n".join([HEADER, *rows, ""]))
