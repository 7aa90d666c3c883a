"""A tokenizer as llama.cpp reads it from a GGUF file: by kind of model, and by the name of its pre-tokenizer.

Llama.cpp has its own implementation of each pre-tokenizer, chosen by name; one that it does not know, or that
is not known here, would give other tokens without an error, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.pruners.calibration.tokens import adds_bos

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How the tokenizers library names the steps -> how llama.cpp names all of them.
PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = MappingProxyType(
    {
        ("ByteLevel with words",): "gpt-2",
        ("Digits", "ByteLevel with words"): "smollm",
        (f"Split {_LLAMA3}", "ByteLevel"): "llama-bpe",
        (f"Split {_LLAMA3.replace('{1,3}', '')}", "ByteLevel"): "qwen2",
    }
)

# Of llama.cpp (llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if llama.cpp has no such tokenizer, or it isn't known here."""
    read = _read(tokenizer)
    steps = _pre_tokenizer(read)
    is_bytes = any(step.startswith("ByteLevel") for step in steps)
    if is_bytes and steps not in PRE_TOKENIZERS:
        raise ValueError(
            f"Expected a pre-tokenizer known to llama.cpp ({', '.join(PRE_TOKENIZERS.values())}), got "
            f"{' + '.join(steps)}. Use the format hf."
        )
    if not is_bytes and not read["model"].get("byte_fallback"):
        raise ValueError(
            "Expected a byte-level or SentencePiece tokenizer for gguf, got another. Use the format hf."
        )


def write_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, n_tokens: int, scratch: Path) -> None:
    """Add a tokenizer to a `gguf.GGUFWriter`: ``gpt2`` (byte-level BPE), or ``llama`` (SentencePiece BPE).

    Args:
        writer: of the file.
        tokenizer: see `check_tokenizer`.
        n_tokens: that the model has, with those that the tokenizer does not use.
        scratch: directory for a copy of the tokenizer.
    """
    from gguf import SpecialVocab

    read = _read(tokenizer)
    pre = PRE_TOKENIZERS.get(_pre_tokenizer(read))
    tokens, types = _tokens(read, n_tokens)
    writer.add_tokenizer_model("gpt2" if pre else "llama")
    writer.add_tokenizer_pre(pre or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not pre:
        writer.add_token_scores([-float(index) for index in range(n_tokens)])  # the higher is joined first
    tokenizer.save_pretrained(scratch)
    roles = ("bos", "eos", "unk", "pad")
    special = SpecialVocab(scratch, load_merges=bool(pre), special_token_types=roles, n_vocab=n_tokens)
    special.add_special_token = {
        "bos": adds_bos(tokenizer)
    }  # as it does; SpecialVocab guesses from its files
    special.add_to_gguf(writer, quiet=True)
    writer.add_add_space_prefix(not pre and tokenizer.tokenize("a")[0].startswith("▁"))


def _read(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as plain values.

    Raises:
        ValueError: unless it is a BPE.
    """
    fast = tokenizer.is_fast
    read: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str()) if fast else {}
    kind = read["model"]["type"] if fast else "slow"
    if kind != "BPE":
        raise ValueError(f"Expected a BPE tokenizer for gguf, got {kind}. Use the format hf.")
    return read


def _pre_tokenizer(read: Mapping[str, Any]) -> tuple[str, ...]:
    """The steps of a pre-tokenizer, each with the parts that differ."""
    pre_tokenizer = read["pre_tokenizer"]
    if pre_tokenizer is None:
        return ()
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return tuple(_step(part) for part in parts)


def _step(part: Mapping[str, Any]) -> str:
    kind: str = part["type"]
    if kind == "ByteLevel":
        return f"{kind} with words" if part.get("use_regex", True) else kind
    if kind == "Split":
        return f"{kind} {part['pattern'].get('Regex', part['pattern'].get('String'))}"
    return kind


def _tokens(read: Mapping[str, Any], n_tokens: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; ids that nothing has are filled up."""
    tokens = [f"[PAD{index}]" for index in range(n_tokens)]
    types = [_UNUSED] * n_tokens
    unknown = read["model"].get("unk_token")
    for text, index in read["model"]["vocab"].items():
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[index] = text
        types[index] = _UNKNOWN if text == unknown else _BYTE if is_byte else _NORMAL
    for added in read["added_tokens"]:
        index = added["id"]
        tokens[index] = added["content"]
        if types[index] != _UNKNOWN:
            types[index] = _CONTROL if added["special"] else _USER_DEFINED
    return tokens, types
