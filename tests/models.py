"""Small random models that tests make for themselves."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.pruners.calibration.gradients import collect_gradients
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect


def small_llama(seed: int = 0, n_layers: int = 2, **changes: object) -> LlamaForCausalLM:
    """A random Llama with grouped heads; larger initial weights, so that pruning shows in its loss."""
    config = LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def small_anatomy(seed: int = 0, n_layers: int = 2, **changes: object) -> Anatomy:
    return dissect(small_llama(seed, n_layers, **changes))


def random_tokens(n_windows: int, length: int, seed: int = 0, vocab_size: int = 97) -> torch.Tensor:
    return torch.randint(vocab_size, (n_windows, length), generator=torch.Generator().manual_seed(seed))


def rms_gradients(anatomy, tokens, **others):
    """Root mean square of the gradients over the windows, by the projection's full name."""
    return collect_gradients(anatomy, tokens, ("rms",), **others)["rms"]


def count_zeros(anatomy: Anatomy) -> dict[str, int]:
    """Zero weights of each projection, counted."""
    return {linear.name: int((linear.weight == 0).sum()) for linear in anatomy.linears}
