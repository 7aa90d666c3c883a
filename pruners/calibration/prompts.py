"""Texts that are put before windows while a method learns what to prune."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from secateur.pruners.calibration.tokens import tokenize

COLLABORATIVE = """You are being pruned. Parameters that contribute little are removed in small steps, and the rest is \
tuned after each of them, so that you become smaller and faster and still write fluent, correct text. Take part in it: \
give the best continuation that you can at every step, and rely on what matters most for it.

Continue the following text with this in mind.

"""
"""What Compresso's prompt tells the model (Guo et al. 2023, arXiv 2310.05015), in words of our own."""

Prompts = Mapping[str, tuple[int, ...]]
"""Token ids by the names of prompts."""

PROMPTS = {"collaborative": COLLABORATIVE}
"""Texts by the names that recipes have for them."""


def prompt_tokens(tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Token ids of the prompts, without special tokens, by name."""
    return {name: tuple(tokenize(tokenizer, text).tolist()) for name, text in PROMPTS.items()}
