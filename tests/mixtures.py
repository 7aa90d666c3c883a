"""Small random mixtures of experts of each family that tests run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 512

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
    "initializer_range": 0.2,
}
_MIXTURE = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _MIXTURE),
    "qwen2_moe": ("qwen2_moe", _MIXTURE | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2}),
    "qwen3_moe": ("qwen3_moe", _MIXTURE | {"norm_topk_prob": True}),
    "olmoe": ("olmoe", _MIXTURE),
    "granitemoe": ("granitemoe", _MIXTURE | {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "phimoe": ("phimoe", _MIXTURE),
    "deepseek_v2": (
        "deepseek_v2",
        _LATENT | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "gpt_oss": ("gpt_oss", _MIXTURE | {"sliding_window": 16}),
    "llama4_text": (
        "llama4_text",
        _MIXTURE | {"num_experts_per_tok": 1, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1},
    ),
}
"""By name: `model_type`, and what the config has beside the common sizes. Some keep a first dense block."""


def make_mixture(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family, in evaluation mode; correction biases of routers are no longer zero."""
    kind, own = MIXTURES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**_COMMON, **own, **changes})).to(dtype)
    for parameter in model.parameters():
        if not parameter.any():  # routers and biases that begin at zero
            torch.nn.init.normal_(parameter, std=0.2)
    for path, buffer in model.named_buffers():
        if path.endswith("correction_bias"):
            torch.nn.init.normal_(buffer, std=0.05)
    return model.eval().requires_grad_(False)
