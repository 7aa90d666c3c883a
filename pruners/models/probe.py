"""Probes of a live model by a few tokens: what mixes tokens, and whether blocks give each other hidden states alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner

N_TOKENS = 5


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context of evaluation mode without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def probe_tokens(model: Any) -> Tensor:
    """The first few ids of the vocabulary, as a batch of one."""
    embedding = model.get_input_embeddings()
    ids = torch.arange(N_TOKENS, device=embedding.weight.device)[None]
    return ids % int(embedding.num_embeddings)


def mixes_tokens(model: nn.Module, module: nn.Module) -> bool:
    """True if what a module gives for the last token depends on the first one."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, _first(output)))

    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        with evaluating(model):
            model(input_ids=probe_tokens(model), use_cache=False)
    finally:
        handle.remove()
    if not calls:
        return False
    args, kwargs, wanted = calls[0]
    hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if hidden.is_meta:  # without values nothing can be told: modules that are asked about mostly do
        return True
    other = hidden.clone()
    other[:, 0] += 1 + other[:, 0].abs()
    changed = [other if value is hidden else value for value in args]
    named = {key: other if value is hidden else value for key, value in kwargs.items()}
    with evaluating(model):
        return not _alike(_first(module(*changed, **named))[:, -1], wanted[:, -1])


def check_blocks(anatomy: Anatomy) -> None:
    """Raise a ValueError unless the model, run block by block, gives its own logits, which look at no later token."""
    model, tokens = anatomy.model, probe_tokens(anatomy.model)
    runner = BlockRunner(anatomy)
    with evaluating(model):
        wanted = model(input_ids=tokens, use_cache=False).logits
        later = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)
        causal = _alike(model(input_ids=later, use_cache=False).logits[:, :-1], wanted[:, :-1])
        got = anatomy.logits(anatomy.tail(runner.run(runner.start(tokens))))
    if not causal:
        raise ValueError("Expected a causal LM, got one whose logits depend on later tokens.")
    tolerance = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    if not torch.allclose(got, wanted, rtol=0.0, atol=tolerance):
        raise ValueError(
            "Expected blocks that give each other hidden states alone, got others: run one by one they give other "
            "logits than the model."
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    """True if they differ by rounding at most; tokens are computed together with others, which moves it."""
    tolerance = 64 * torch.finfo(other.dtype).eps * other.abs().max()
    return bool((one - other).abs().max() <= tolerance)


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
