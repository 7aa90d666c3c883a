"""A tokenizer as llama.cpp reads it from a GGUF file: by kind of model, and by the name of its pre-tokenizer.

Llama.cpp has its own implementation of each pre-tokenizer, chosen by name; one that it does not know, or that
is not known here, would give other tokens without an error, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about its tokenizer.

    Args:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE with bytes as a fallback).
        pre: name of the pre-tokenizer.
        tokens: by id.
        types: of each.
        scores: of each; the higher is joined first. Empty for ``gpt2``.
        merges: pairs in the order in which they are joined. Empty for ``llama``.
        special: ids by their role, ``bos`` and the like.
        adds_bos: whether a text begins with one.
        adds_space: whether a text begins with a space.
        chat_template: Jinja text, or None.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special: Mapping[str, int]
    adds_bos: bool
    adds_space: bool
    chat_template: str | None


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        n_tokens: that the model has, with those that the tokenizer does not use.

    Raises:
        ValueError: if llama.cpp has no such tokenizer, or it isn't known here.
    """
    read = (
        json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    )
    model = read["model"]
    if model["type"] != "BPE":
        raise ValueError(f"Expected a BPE tokenizer for gguf, got {model['type']}. Use the format hf.")
    steps = _steps(read["pre_tokenizer"])
    is_bytes = any(step.startswith("ByteLevel") for step in steps)
    if is_bytes and steps not in PRE_TOKENIZERS:
        raise ValueError(
            f"Expected a pre-tokenizer known to llama.cpp ({', '.join(PRE_TOKENIZERS.values())}), got "
            f"{' + '.join(steps)}. Use the format hf."
        )
    if not is_bytes and not model.get("byte_fallback"):
        raise ValueError(
            "Expected a byte-level or SentencePiece tokenizer for gguf, got another. Use the format hf."
        )
    tokens, types = _tokens(read, n_tokens)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {
        role: getattr(tokenizer, f"{role}_token_id")
        for role in ("bos", "eos", "unk", "pad")
        if getattr(tokenizer, f"{role}_token_id") is not None
    }
    first = tokenizer("a")["input_ids"][0]
    return Vocabulary(
        model="gpt2" if is_bytes else "llama",
        pre=PRE_TOKENIZERS[steps] if is_bytes else "default",
        tokens=tokens,
        types=types,
        scores=[] if is_bytes else [-float(index) for index in range(len(tokens))],
        merges=merges if is_bytes else [],
        special=special,
        adds_bos=first == special.get("bos")
        and tokenizer("a", add_special_tokens=False)["input_ids"][0] != first,
        adds_space=not is_bytes and tokenizer.tokenize("a")[0].startswith("▁"),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add it to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for role, index in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The steps of a pre-tokenizer, each with what matters of it."""
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
