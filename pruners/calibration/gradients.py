"""Gradients of the dense model's loss: one pass over the calibration windows for all projections."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.pruners.calibration.gradient_kinds import KINDS, Kind, Value, empty_like
from secateur.pruners.calibration.pass_kinds import PASS_KINDS, n_bytes
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.models.memory import check_memory
from secateur.pruners.models.runner import fp32_bytes, in_fp32
from secateur.pruners.stores.block_files import load_tensors, save_tensors

Gradients: TypeAlias = dict[str, Tensor]
"""By the projection's full name."""


@torch.enable_grad()
def collect_gradients(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    kinds: Collection[Kind],
    *,
    on_window: Callable[[int], None] = lambda index: None,
) -> dict[Kind, Gradients]:
    """Gradients of the calibration windows, of several kinds: one pass for all kinds of one value.

    The computation is in fp32 whatever the model's dtype, window by window, so the result does not depend on
    batches. Kinds with a pass of their own are collected by `PASS_KINDS`. Memory: see
    `gradient_bytes`; it is checked first.

    Args:
        anatomy: the dense model; not changed.
        tokens: calibration windows of at least two tokens.
        kinds: rows of `KINDS` or of `PASS_KINDS`.
        on_window: told the index of each window that is done, in each backward pass.

    Returns:
        By kind, for each projection by its full name, in fp32 on the projection's device: an ``out in`` matrix,
        for `sums` a vector, for `perturbed` a score a unit, of output projections alone.

    Raises:
        ValueError: if a gradient is not finite, or there is too little memory.
    """
    check_gradients(anatomy, kinds, tokens.shape[1])
    own = {kind: PASS_KINDS[kind] for kind in kinds if kind in PASS_KINDS}
    found: dict[Kind, Gradients] = {
        kind: {linear.name: empty_like(kind, linear) for linear in anatomy.linears}
        for kind in kinds
        if kind not in own
    }
    for value in dict.fromkeys(KINDS[kind].value for kind in found):
        _pass(anatomy, tokens, value, {k: x for k, x in found.items() if KINDS[k].value is value}, on_window)
    for kind, by_name in found.items():
        _finish(kind, by_name, len(tokens))
    return found | {kind: row.collect(anatomy, tokens) for kind, row in own.items()}


def check_gradients(anatomy: Anatomy, kinds: Collection[Kind], length: int) -> None:
    """Raise a ValueError unless there is the memory to collect them from windows of so many tokens."""
    if not kinds:
        return
    check_memory(
        gradient_bytes(anatomy, kinds, length),
        anatomy.embedding.weight.device,
        f"gradients of windows of {length} tokens",
        "Use shorter windows, or a method without gradients (`secateur list methods`).",
    )


def gradient_bytes(anatomy: Anatomy, kinds: Collection[Kind], length: int) -> int:
    """About the memory of `collect_gradients` beyond the model, in bytes: the results, and the work of one window."""
    own = [PASS_KINDS[kind].work_bytes(anatomy, length) for kind in kinds if kind in PASS_KINDS]
    backward = [kind for kind in kinds if kind in KINDS]
    return sum(own) + (_backward_bytes(anatomy, backward, length) if backward else 0)


def _backward_bytes(anatomy: Anatomy, kinds: Collection[Kind], length: int) -> int:
    linears = list(anatomy.linears)
    kept = sum(KINDS[kind].n_bytes for kind in kinds) * sum(linear.n_weights for linear in linears)
    halves = fp32_bytes(anatomy.model)  # in fp32 meanwhile
    activations = length * sum(linear.out_features for linear in linears) * 4
    scores = sum(block.n_heads for block in anatomy.blocks) * length**2 * 4
    logits = 3 * length * anatomy.vocab_size * 4  # they, their softmax and their gradient
    largest = max(linear.n_weights for linear in linears) * 8  # its gradient, and the summand
    return kept + halves + activations + scores + logits + largest


def _pass(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    value: Value,
    found: Mapping[Kind, Gradients],
    on_window: Callable[[int], None],
) -> None:
    """Add up, over the windows, the kinds of gradients of one value."""
    with ExitStack() as stack:
        stack.enter_context(in_fp32(anatomy.model))
        for linear in anatomy.linears:
            totals = {kind: by_name[linear.name] for kind, by_name in found.items()}
            stack.enter_context(_adding(linear, totals))
        for index, window in enumerate(tokens):
            inputs = window[None].to(anatomy.embedding.weight.device)
            scored = slice(anatomy.first_scored, None)
            logits = anatomy.model(input_ids=inputs, use_cache=False).logits[0]
            value(logits[scored], inputs[0, scored]).backward()
            on_window(index)


def _finish(kind: Kind, by_name: Gradients, n_windows: int) -> None:
    """Turn sums into means, or root mean squares, in place."""
    for name, total in by_name.items():
        if not torch.isfinite(total).all():
            raise ValueError(
                f"Expected finite gradients, got NaN or infinity at {name}. Check the calibration text."
            )
        total.div_(n_windows)
        if KINDS[kind].root:
            total.sqrt_()


@contextmanager
def _adding(linear: Linear, totals: Mapping[Kind, Tensor]) -> Iterator[None]:
    """Context in which the weight's gradients are added to the totals and freed as soon as they are computed."""
    weight: nn.Parameter = linear.module.weight  # type: ignore[assignment]

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.T if linear.transposed else parameter.grad
        parameter.grad = None
        with torch.no_grad():
            for kind, total in totals.items():
                total.add_(KINDS[kind].of_window(linear, gradient))

    needed_before = weight.requires_grad
    weight.requires_grad_(True)
    hook = weight.register_post_accumulate_grad_hook(add)
    try:
        yield
    finally:
        hook.remove()
        weight.grad = None
        weight.requires_grad_(needed_before)


def model_statistics(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    *,
    gradients: Collection[Kind],
    path: Path | None = None,
    identity: str = "",
) -> ModelStatistics:
    """Statistics of the dense model as a whole.

    Args:
        gradients: kinds of them to collect.
        path: file of cached gradients (see `kind_path`), read if its identity is this one; None: no cache.
        identity: of the model and the tokens, in one text.

    Raises:
        LevelStoreError: if the file can't be written.
        ValueError: as `collect_gradients` does.
    """
    known = {kind: load_tensors(kind_path(path, kind), identity) if path else None for kind in gradients}
    found = {kind: by_name for kind, by_name in known.items() if by_name is not None}
    missing = [kind for kind in gradients if kind not in found]
    for kind, by_name in collect_gradients(anatomy, tokens, missing).items() if missing else ():
        if path:
            save_tensors(kind_path(path, kind), by_name, identity)
        found[kind] = by_name
    n_windows, length = tokens.shape
    return ModelStatistics(len(anatomy.blocks), found, windows=(n_windows, length))


def kind_path(path: Path, kind: Kind) -> Path:
    """The file of a kind, beside that of the unsigned gradients, which has the plain name."""
    return path if kind == "rms" else path.with_stem(f"{path.stem}-{kind}")


def gradients_to_write(path: Path, anatomy: Anatomy, kinds: Collection[Kind]) -> int:
    """Bytes of the kinds that are not cached yet."""
    per_weight = sum(n_bytes(kind) for kind in kinds if not kind_path(path, kind).exists())
    return per_weight * sum(linear.n_weights for linear in anatomy.linears)


def gradients_path(directory: Path) -> Path:
    """File of the gradients beside a level store."""
    return directory.with_name(f"{directory.name}-gradients.safetensors")
