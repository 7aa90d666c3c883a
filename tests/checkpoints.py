"""A small model to save and load, and how loading fails."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from secateur.pruners.models.checkpoints.checkpoint import ModelError
from secateur.pruners.models.loading import load_model

CONFIG = {
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
WORDS = {"<unk>": 0, "the": 1, "Ġcat": 2, "t": 3, "h": 4, "e": 5, "Ġ": 6, "th": 7}


def random_llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**CONFIG)).eval()


def fails(name, match, **options):
    """`load_model` fails with one line that matches."""
    with pytest.raises(ModelError, match=match) as caught:
        load_model(str(name), **options)
    assert "\n" not in str(caught.value)
