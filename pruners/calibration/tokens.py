"""Token ids of a text, and their hash."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def tokens_sha256(ids: Int64[Tensor, "..."]) -> str:
    """SHA-256 of token ids in their order, as little-endian 64-bit integers; the same on every platform."""
    return hashlib.sha256(ids.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Int64[Tensor, " tokens"]:
    """The token ids of a text without special tokens; no warning that it is longer than the model's context."""
    ids: list[int] = tokenizer(
        text,
        add_special_tokens=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
