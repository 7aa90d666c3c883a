"""Sums over calibration windows of what gradients of all projections give, a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.calibration.gradient_kinds import Value
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.models.runner import fp32_bytes, in_fp32

Summand: TypeAlias = Callable[[Linear, Float[Tensor, "out in"]], Float[Tensor, "..."]]
"""Summand of a window, from a projection and its gradient."""


@torch.enable_grad()
def add_over_windows(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    value: Value,
    totals: Sequence[tuple[Summand, Mapping[str, Tensor]]],
    on_window: Callable[[int], None] = lambda index: None,
) -> None:
    """Add summands of each window to totals, in one backward pass a window, in fp32 whatever the model's dtype.

    Args:
        anatomy: the dense model; not changed.
        tokens: calibration windows of at least two tokens.
        value: the differentiated function.
        totals: summands, each with its totals by the projection's full name, which are added to in place.
        on_window: told the index of each window that is done.
    """
    with ExitStack() as stack:
        stack.enter_context(in_fp32(anatomy.model))
        for linear in anatomy.linears:
            stack.enter_context(_adding(linear, [(of, by_name[linear.name]) for of, by_name in totals]))
        for index, window in enumerate(tokens):
            inputs = window[None].to(anatomy.embedding.weight.device)
            scored = slice(anatomy.first_scored, None)
            logits = anatomy.model(input_ids=inputs, use_cache=False).logits[0]
            value(logits[scored], inputs[0, scored]).backward()
            on_window(index)


def backward_bytes(anatomy: Anatomy, per_weight: int, length: int) -> int:
    """About the memory of `add_over_windows` beyond the model, in bytes, with totals of so many bytes a weight."""
    linears = list(anatomy.linears)
    kept = per_weight * sum(linear.n_weights for linear in linears)
    halves = fp32_bytes(anatomy.model)  # in fp32 meanwhile
    activations = length * sum(linear.out_features for linear in linears) * 4
    scores = sum(block.n_heads for block in anatomy.blocks) * length**2 * 4
    logits = 3 * length * anatomy.vocab_size * 4  # they, their softmax and their gradient
    largest = max(linear.n_weights for linear in linears) * 8  # its gradient, and the summand
    return kept + halves + activations + scores + logits + largest


@contextmanager
def _adding(linear: Linear, totals: Sequence[tuple[Summand, Tensor]]) -> Iterator[None]:
    """Context in which the weight's gradients are added to the totals and freed as soon as they are computed."""
    weight: nn.Parameter = linear.module.weight  # type: ignore[assignment]

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.T if linear.transposed else parameter.grad
        parameter.grad = None
        with torch.no_grad():
            for of_window, total in totals:
                total.add_(of_window(linear, gradient))

    needed_before = weight.requires_grad
    weight.requires_grad_(True)
    hook = weight.register_post_accumulate_grad_hook(add)
    try:
        yield
    finally:
        hook.remove()
        weight.grad = None
        weight.requires_grad_(needed_before)
