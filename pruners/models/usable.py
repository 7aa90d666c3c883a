"""Checks of a loaded model before anything is computed: finite weights, ids within the embedding, windows that fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.pruners.models.checkpoints.checkpoint import ModelError


class NotFiniteError(ValueError):
    """Numbers that a model computes are NaN or infinite."""


def check_weights(model: nn.Module) -> None:
    """Raise a ModelError that names a weight with NaN or infinity; weights without memory are not looked at."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or all(bool(torch.isfinite(part).all()) for part in _parts(parameter)):
            continue
        n_bad = int((~torch.isfinite(parameter)).sum())
        narrow = parameter.dtype == torch.float16
        raise ModelError(
            f"Expected finite weights, got NaN or infinity in {n_bad:,} of the {parameter.numel():,} of {name}. "
            + ("Try bfloat16 or float32." if narrow else "Get the checkpoint anew.")
        )


PART = 1 << 24
"""Weights that are looked at together: of a mapped model no more are in memory."""


def _parts(parameter: Tensor) -> tuple[Tensor, ...]:
    """The parameter in parts of about `PART` weights."""
    if parameter.numel() <= PART:
        return (parameter,)
    parts: tuple[Tensor, ...] = parameter.split(max(1, PART * len(parameter) // parameter.numel()))
    return parts


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise a ModelError if the tokenizer gives ids that the embedding hasn't.

    Tokens added to its vocabulary may be beyond, such as those for images in the text models of a family (Gemma 3).
    """
    embedding = model.get_input_embeddings()
    n_rows = getattr(embedding, "num_embeddings", None)
    if n_rows is not None and tokenizer.vocab_size > n_rows:
        raise ModelError(
            f"Expected a tokenizer whose ids are within the {n_rows:,} rows of the model's embedding, got one of "
            f"{tokenizer.vocab_size:,} tokens. Take model and tokenizer from one place."
        )


def check_windows(model: Any, window: int, *, allow_long: bool) -> None:
    """Raise a ValueError if windows are longer than the model's positions.

    Args:
        allow_long: permits it where positions are not learned: rotary ones go on beyond those of the training.
    """
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or window <= most:
        return
    tokens = model.get_input_embeddings()
    tables = (x for x in model.modules() if isinstance(x, nn.Embedding) and x is not tokens)
    learned = any(most <= table.num_embeddings < most + 8 for table in tables)
    if learned:
        raise ValueError(
            f"Expected windows of at most {most:,} tokens, the learned positions of the model, got {window:,}. Use "
            f"shorter windows."
        )
    if not allow_long:
        raise ValueError(
            f"Expected windows of at most {most:,} tokens, the model's positions, got {window:,}. Use shorter ones, or "
            f"set `allow_long_windows` (`--allow-long-windows`) to measure beyond them."
        )


def check_finite(values: Tensor, what: str) -> None:
    """Raise a NotFiniteError if there is NaN or infinity among values that a dense model computed."""
    if not torch.isfinite(values).all():
        narrow = values.dtype == torch.float16
        advice = "Try bfloat16 or float32." if narrow else "Check its weights, or try float32."
        raise NotFiniteError(
            f"Expected finite {what}, got NaN or infinity in {str(values.dtype).removeprefix('torch.')}. {advice}"
        )
