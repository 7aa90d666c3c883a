"""Windows of token ids, cut from a text, for calibration, search and test."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.evaluators.data.sources import TextError
from secateur.evaluators.data.text import Text
from secateur.pruners.calibration.tokens import begin, tokenize

Order = Literal["sequential", "random"]


def windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    window: int,
    n_tokens: int | None = None,
    order: Order = "sequential",
    seed: int = 0,
    bos: int | None = None,
) -> Int64[Tensor, "n_windows {window}"]:
    """Non-overlapping windows of a text's token ids; a shorter last one is dropped.

    ``random`` draws a permutation of all windows of the text from the seed alone: a smaller `n_tokens` gives
    the first windows of a larger one, so that subsets are nested, each spread over the whole text.
    ``sequential`` keeps the text's order, as published perplexities do. Use ``random`` for calibration and
    search, ``sequential`` for test.

    Args:
        window: tokens a window, > 0.
        n_tokens: tokens in all, a positive multiple of `window`; None: as many as there are.
        bos: token that each window begins with, in place of the last token of its text; None: no special token.

    Raises:
        TextError: if the text has fewer tokens than asked.
        ValueError: if `window` or `n_tokens` is out of range.
    """
    if window <= 0:
        raise ValueError(f"Expected `window` > 0, got {window}.")
    if n_tokens is not None and (n_tokens <= 0 or n_tokens % window):
        raise ValueError(
            f"Expected the number of tokens of `data.{text.part}` to be a positive multiple of the window, "
            f"{window}, got {n_tokens}. Give {max(1, round(n_tokens / window)) * window}."
        )
    ids = tokenize(tokenizer, text.text)
    whole = len(ids) // window
    needed = 1 if n_tokens is None else n_tokens // window
    if whole < needed:
        raise TextError(
            f"Expected at least {needed * window} tokens in `data.{text.part}` ({text.source}), "
            f"got {len(ids)}. {_REMEDY[text.part]}"
        )
    rows = ids[: whole * window].view(whole, window)
    if order == "random":
        rows = rows[torch.from_numpy(np.random.default_rng(seed).permutation(whole))]
    return begin(rows if n_tokens is None else rows[:needed], bos)


_REMEDY = {
    "calibration": "Give a longer text or fewer calibration tokens.",
    "search": "Give a longer text or lower `evaluator.fidelities`.",
    "test": "Give a longer text or fewer test tokens.",
}
