"""Perplexity of a whole model by its own forward pass, independent of a search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.evaluators.data.text import Text, load_text, measured_address
from secateur.evaluators.data.tokens import windows
from secateur.evaluators.tasks.task_set import TaskPlan, TaskSet
from secateur.pruners.calibration.tokens import bos_token, tokens_sha256
from secateur.pruners.models.account import zeros_of
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.pruners.models.usable import check_finite, check_windows


@torch.no_grad()
def cross_entropy(model: nn.Module, tokens: Int[Tensor, "windows length"], first: int = 0) -> float:
    """Mean cross-entropy of the next token in nats, window by window, in fp32.

    Args:
        model: a causal LM of transformers.
        tokens: windows; nothing is predicted across them.
        first: position of a window whose prediction is the first that counts, see `Anatomy.first_scored`.
    """
    device = next(model.parameters()).device
    total = 0.0
    for window in tokens.to(device):
        logits = model(input_ids=window[None], use_cache=False).logits[0, first:-1]
        check_finite(logits, "logits")
        total += float(nn.functional.cross_entropy(logits.float(), window[first + 1 :], reduction="sum"))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1 - first))


def evaluate_model(
    name: str,
    *,
    text: str = "docs",
    part: Any = "test",
    n_tokens: int = 8192,
    window: int = 512,
    bos: bool | Literal["auto"] = "auto",
    allow_long_windows: bool = False,
    tasks: TaskPlan | None = None,
    say: Callable[[str], None] = lambda line: None,
    **loading: Any,
) -> dict[str, float | str | int]:
    """Load a model and measure it on a text, in windows without overlap, and in tasks.

    Args:
        name: see `load_model`.
        text: source of text; of ``docs`` the topics of `part`.
        n_tokens: tokens to measure on, a multiple of `window`.
        window: tokens that the model sees at once.
        bos: see `bos_token`.
        allow_long_windows: see `check_windows`.
        say: given progress, one line at a time.
        loading: of `load_model`: dtype, device, trust_remote_code.

    Returns:
        ``perplexity``, ``ce`` (nats per token), ``params``, ``zeros`` (share of the prunable weights), and the data:
        ``text``, its ``range``, ``tokens``, ``window``, ``bos`` (the token that windows begin with, or
        ``none``), ``sha256`` of the token ids. For each task its metrics, such as ``piqa acc``, and its ``samples``.

    Raises:
        ValueError: if the model, the text or a task is wrong.
    """
    content = Text(part, text, load_text(text, part, say))
    say(f"loading {name}")
    loaded = load_model(name, say=say, **{"device": "auto", **loading})
    check_windows(loaded.model, window, allow_long=allow_long_windows)
    begun = bos_token(loaded.tokenizer, bos)
    anatomy = dissect(loaded.model, begun)
    tokens = windows(loaded.tokenizer, content, window, n_tokens, bos=begun, say=say)
    scores = {} if tasks is None else _scores(TaskSet(tasks, loaded.model, loaded.tokenizer, bos), say)
    say(f"measuring {tokens.numel()} tokens")
    ce = cross_entropy(loaded.model, tokens, anatomy.first_scored)
    return {
        "model": name,
        "perplexity": math.exp(ce),
        "ce": ce,
        "params": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "zeros": zeros_of(anatomy),
        "text": text,
        "range": measured_address(text),
        "tokens": tokens.numel(),
        "window": window,
        "bos": "none" if begun is None else begun,
        "sha256": tokens_sha256(tokens),
        **scores,
    }


def _scores(tasks: TaskSet, say: Callable[[str], None]) -> dict[str, float | int]:
    say(f"measuring {', '.join(tasks.names)}")
    found: dict[str, float | int] = {}
    for name, result in tasks.measure().items():
        found |= {f"{name} {metric}": value for metric, value in result.metrics.items()}
        found |= {f"{name} margin": result.margin} if result.margins else {}
        found[f"{name} samples"] = result.samples
    return found
