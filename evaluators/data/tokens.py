"""Windows of token ids, cut from a text, for calibration, search and test."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.evaluators.data.documents import Say, TextError, silent
from secateur.evaluators.data.text import Text
from secateur.pruners.calibration.tokens import LARGE, begin, pieces, tokenize

Order = Literal["sequential", "random"]

CHARACTERS_PER_TOKEN = 5  # with some to spare
_PIECES_A_LINE = 200


def windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    window: int,
    n_tokens: int | None = None,
    order: Order = "sequential",
    seed: int = 0,
    bos: int | None = None,
    *,
    at_most: bool = False,
    say: Say = silent,
) -> Int64[Tensor, "n_windows {window}"]:
    """Non-overlapping windows of a text's token ids; a shorter last one is dropped.

    ``random`` draws a permutation of all windows of the text from the seed alone: a smaller `n_tokens` gives
    the first windows of a larger one, so that subsets are nested, each spread over the whole text.
    ``sequential`` keeps the text's order, as published perplexities do. Use ``random`` for calibration and
    search, ``sequential`` for test.

    Of a text of more than `LARGE` characters no more is tokenised than is needed: ``random`` draws a permutation of
    pieces of about two windows each, and takes the whole windows of each in turn, so that subsets are nested, too.

    Args:
        window: tokens a window, > 0.
        n_tokens: tokens in all, a positive multiple of `window`; None: as many as there are.
        bos: token that each window begins with, in place of the last token of its text; None: no special token.
        at_most: give fewer where the text has fewer.
        say: told the progress through a large text.

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
    large = len(text.text) > LARGE
    if order == "random" and large:
        rows, n_ids = _drawn(tokenizer, text, window, n_tokens, seed, say)
    else:
        if large and n_tokens is None:
            say(f"tokenising {len(text.text):,} characters of {text.source}")
        ids = tokenize(tokenizer, text.text, n_tokens if order == "sequential" else None)
        n_ids, rows = len(ids), ids[: len(ids) // window * window].view(-1, window)
        if order == "random":
            rows = rows[torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))]
    needed = 1 if n_tokens is None or at_most else n_tokens // window
    if len(rows) < needed:
        raise TextError(
            f"Expected at least {needed * window} tokens in `data.{text.part}` ({text.source}), "
            f"got {n_ids}. {_REMEDY[text.part]}"
        )
    return begin(rows if n_tokens is None else rows[: n_tokens // window], bos)


def _drawn(
    tokenizer: PreTrainedTokenizerBase, text: Text, window: int, n_tokens: int | None, seed: int, say: Say
) -> tuple[Int64[Tensor, "n_windows {window}"], int]:
    """Windows of pieces drawn from a text, and the number of tokens they were cut from."""
    found = pieces(text.text, CHARACTERS_PER_TOKEN * 2 * window)
    rows: list[Tensor] = []
    n_rows = n_ids = 0
    for done, index in enumerate(np.random.default_rng(seed).permutation(len(found)), start=1):
        ids = tokenize(tokenizer, found[index])
        rows.append(ids[: len(ids) // window * window].view(-1, window))
        n_rows, n_ids = n_rows + len(rows[-1]), n_ids + len(ids)
        if done % _PIECES_A_LINE == 0:
            say(f"tokenising piece {done}/{len(found)} of {text.source}")
        if n_tokens is not None and n_rows * window >= n_tokens:
            break
    return torch.cat(rows), n_ids


_REMEDY = {
    "calibration": "Give a longer text or fewer calibration tokens.",
    "search": "Give a longer text or lower `evaluator.fidelities`.",
    "test": "Give a longer text or fewer test tokens.",
}
