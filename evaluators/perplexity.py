"""Perplexity of a whole model by its own forward pass, independent of a search."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.evaluators.data.text import Text, load_text, measured_address
from secateur.evaluators.data.tokens import windows
from secateur.evaluators.tasks.task_set import TaskPlan, TaskSet
from secateur.pruners.calibration.stream import Walk
from secateur.pruners.calibration.tokens import bos_token, tokens_sha256
from secateur.pruners.models.account import zeros_of
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.mapped import MappedModel
from secateur.pruners.models.opening import open_model
from secateur.pruners.models.usable import check_finite, check_windows
from secateur.spaces.measurement import perplexity_of

FP32_TOKENS = 4096
"""Positions whose logits are copied to fp32 at a time."""


@torch.no_grad()
def cross_entropy(model: nn.Module, tokens: Int[Tensor, "windows length"], first: int = 0) -> float:
    """Mean cross-entropy of the next token in nats, window by window, in fp32.

    Args:
        model: a causal LM of transformers.
        tokens: windows; nothing is predicted across them.
        first: position of a window whose prediction is the first that counts, see `Anatomy.first_scored`.
    """
    device = next(model.parameters()).device
    windows = tokens.to(device)
    return _mean((model(input_ids=x[None], use_cache=False).logits[0] for x in windows), windows, first)


@torch.no_grad()
def streamed_cross_entropy(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> float:
    """`cross_entropy` of a model, all windows through one block after the other: each is read from its file once."""
    walk = Walk(anatomy, tokens, tokens.shape[1])  # a window at a time, as there
    for block in anatomy.blocks:
        with anatomy.hold(block):
            walk.hidden = walk.through(block)
    return _mean((anatomy.logits(anatomy.tail(x))[0] for x in walk.hidden), tokens, anatomy.first_scored)


def _mean(
    logits: Iterable[Float[Tensor, "length vocabulary"]], tokens: Int[Tensor, "windows length"], first: int
) -> float:
    """Mean cross-entropy over the windows, from the logits of each."""
    total = 0.0
    for of_window, window in zip(logits, tokens, strict=True):
        scored, targets = of_window[first:-1], window[first + 1 :].to(of_window.device)
        check_finite(scored, "logits")
        for part, ids in zip(scored.split(FP32_TOKENS), targets.split(FP32_TOKENS), strict=True):
            total += float(nn.functional.cross_entropy(part.float(), ids, reduction="sum"))
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
    stream: str = "auto",
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
        stream: a word of `STREAM`, see `open_model`; the numbers are the same.
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
    loaded = open_model(name, stream=stream, say=say, **{"device": "auto", **loading})
    check_windows(loaded.model, window, allow_long=allow_long_windows)
    begun = bos_token(loaded.tokenizer, bos)
    anatomy = loaded.dissect(begun)
    tokens = windows(loaded.tokenizer, content, window, n_tokens, bos=begun, say=say)
    scores = {} if tasks is None else _scores(TaskSet(tasks, loaded.model, loaded.tokenizer, bos), say)
    say(f"measuring {tokens.numel()} tokens")
    if isinstance(loaded, MappedModel):
        ce = streamed_cross_entropy(anatomy, tokens)
    else:
        ce = cross_entropy(loaded.model, tokens, anatomy.first_scored)
    return {
        "model": name,
        "perplexity": perplexity_of(ce),
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
