"""Calibration data: token ids of texts, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Int, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def tokens_sha256(ids: Int64[Tensor, "..."]) -> str:
    """SHA-256 of token ids in their order, as little-endian 64-bit integers; the same on every platform."""
    return hashlib.sha256(ids.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


LARGE = 8_000_000
"""Characters of a text from which on it is tokenised by pieces, and no more of it than is needed."""

PIECE = 1_000_000  # characters
_MARGIN = 64  # tokens before the end of a piece that do not depend on what follows


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, n_first: int | None = None
) -> Int64[Tensor, " tokens"]:
    """The first token ids of a text, or all, without special tokens, and without a warning if they are many.

    Of a long text no more is tokenised than is needed, and by pieces that begin with a line if all of a `LARGE` one is.
    """
    if n_first is not None:
        length = PIECE
        while length < len(text):
            ids = _ids(tokenizer, text[:length])
            if len(ids) >= n_first + _MARGIN:
                return torch.tensor(ids[:n_first], dtype=torch.int64)
            length *= 2
    elif len(text) > LARGE:
        found = [torch.tensor(_ids(tokenizer, piece), dtype=torch.int64) for piece in pieces(text, PIECE)]
        return torch.cat(found)
    return torch.tensor(_ids(tokenizer, text)[:n_first], dtype=torch.int64)


def pieces(text: str, size: int) -> list[str]:
    """Contiguous pieces of about so many characters, each ending with a line, or where it has none with a word."""
    starts = [0]
    while starts[-1] + size < len(text):
        start, stop = starts[-1], starts[-1] + size
        ends = (text.rfind(mark, start + size // 2, stop) + 1 for mark in "\n ")
        starts.append(next((end for end in ends if end), stop))
    return [text[start:stop] for start, stop in pairwise([*starts, len(text)])]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(
        text,
        add_special_tokens=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    return ids


def bos_token(tokenizer: PreTrainedTokenizerBase, asked: bool | Literal["auto"] = "auto") -> int | None:
    """Id of the token that every window begins with; None if windows begin with the text.

    Args:
        tokenizer: of the model.
        asked: ``auto``: the tokenizer's BOS token if it puts one before a text by itself, as those of Llama and Gemma
            do; True: its BOS token; False: none.

    Raises:
        ValueError: if a BOS token is asked for, and the tokenizer has none.
    """
    if asked is False or (asked == "auto" and not adds_bos(tokenizer)):
        return None
    found: int | None = tokenizer.bos_token_id
    if found is None:
        raise ValueError(
            "Expected a tokenizer with a BOS token for `bos: true`, got one without. Set `bos: false`."
        )
    return found


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts its BOS token before a text by itself."""
    with_special, text = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    first = with_special[0] if with_special else None
    return first is not None and first == tokenizer.bos_token_id and list(text[:1]) != [first]


def begin(windows: Int64[Tensor, "windows length"], bos: int | None) -> Int64[Tensor, "windows length"]:
    """The windows, each begun with this token in place of its last one: their length and their texts stay apart."""
    if bos is None:
        return windows
    return torch.cat([torch.full_like(windows[:, :1], bos), windows[:, :-1]], dim=1)


@dataclass(frozen=True)
class Source:
    """Text that calibration windows are chosen from.

    Args:
        tokens: ids of its first tokens.
        sha256: of the text.
        name: where the text comes from, with the range that is used.
    """

    tokens: Int64[Tensor, " tokens"]
    sha256: str
    name: str


@dataclass(frozen=True)
class Calibration:
    """Calibration data.

    Args:
        tokens: the windows that statistics are collected on.
        text: source of the text that they are cut from.
        sources: further texts by name, for spaces whose candidates choose their windows.
        all_experts: see `Anatomy.all_experts`.
        contrast: windows of a second text, for metrics over two; None: there is none.
    """

    tokens: Int[Tensor, "windows length"]
    text: str
    sources: Mapping[str, Source] = field(default_factory=dict)
    all_experts: bool = False
    contrast: Int[Tensor, "others _"] | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of the token ids, which says whether statistics of all experts are of all of them, and against what."""
        against = "" if self.contrast is None else f"-{tokens_sha256(self.contrast)}"
        return tokens_sha256(self.tokens) + ("-all-experts" if self.all_experts else "") + against
