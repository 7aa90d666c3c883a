"""Small configs of families with latent attention, experts or recurrent mixers: model type, and what is not common."""

from __future__ import annotations

from typing import Any

from tests.mixtures import MIXTURES

VOCABULARY = 97
WINDOW = 8
"""Sliding windows and chunks; the tests' texts are longer."""

ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

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

OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
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
            **ALTERNATING,
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
