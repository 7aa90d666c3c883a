"""Gradients of the dense model's loss: one pass over the calibration windows for all projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.pruners.families.anatomy import Anatomy, Linear
from secateur.pruners.statistics import ModelStatistics


@torch.enable_grad()
def rms_gradients(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    *,
    on_window: Callable[[int], None] = lambda index: None,
) -> dict[str, Float[Tensor, "_ _"]]:
    """Root mean square over the windows of the gradient of a window's mean cross-entropy, in nats per token.

    So it is unsigned. Pruner-Zero (arXiv 2406.02924) and GBLM (arXiv 2311.04902) take the same sum of squares
    over calibration samples; theirs is larger by a constant, the square root of the number of samples times 100,
    and is kept in fp16, where small gradients vanish.

    The computation is in fp32 whatever the model's dtype, window by window, so the result does not depend on
    batches. Memory beyond the model: one more copy of the prunable weights in fp32 (and of the whole model, while
    this runs, if it is not in fp32), and the activations of one window.

    Args:
        anatomy: the dense model; left as it was.
        tokens: calibration windows of at least two tokens.
        on_window: told the index of each window that is done.

    Returns:
        For each projection by its full name an ``out in`` matrix in fp32, on the projection's device.

    Raises:
        ValueError: if a gradient is not finite.
    """
    model = anatomy.model
    squares = {
        linear.name: torch.zeros_like(linear.weight, dtype=torch.float32) for linear in anatomy.linears
    }
    with ExitStack() as stack:
        stack.enter_context(_in_fp32(model))
        for linear in anatomy.linears:
            stack.enter_context(_adding_squares(linear, squares[linear.name]))
        for index, window in enumerate(tokens):
            inputs = window[None].to(anatomy.embedding.weight.device)
            logits = model(input_ids=inputs, use_cache=False).logits
            F.cross_entropy(logits[0, :-1].float(), inputs[0, 1:].to(logits.device)).backward()
            on_window(index)
    for name, total in squares.items():
        if not torch.isfinite(total).all():
            raise ValueError(
                f"Expected finite gradients, got NaN or infinity at {name}. Check the calibration text."
            )
        total.div_(len(tokens)).sqrt_()
    return squares


@contextmanager
def _adding_squares(linear: Linear, total: Float[Tensor, "out in"]) -> Iterator[None]:
    """While it lasts, the weight's gradient is squared and added as soon as it is there, and let go."""
    weight: nn.Parameter = linear.module.weight  # type: ignore[assignment]

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.T if linear.transposed else parameter.grad
        total.addcmul_(gradient, gradient)
        parameter.grad = None

    needed_before = weight.requires_grad
    weight.requires_grad_(True)
    hook = weight.register_post_accumulate_grad_hook(add)
    try:
        yield
    finally:
        hook.remove()
        weight.grad = None
        weight.requires_grad_(needed_before)


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """While it lasts, parameters and buffers of lower precision are in fp32."""
    lower = [x for x in (*model.parameters(), *model.buffers()) if x.dtype in (torch.float16, torch.bfloat16)]
    stored = [x.data for x in lower]
    try:
        for x in lower:
            x.data = x.data.float()
        yield
    finally:
        for x, data in zip(lower, stored, strict=True):
            x.data = data


def save_gradients(path: Path, gradients: dict[str, Float[Tensor, "_ _"]], identity: str) -> None:
    """Write them, whole or not at all.

    Args:
        path: of a safetensors file.
        gradients: by the projection's full name.
        identity: what they depend on, in one text.

    Raises:
        OSError, SafetensorError: if the file can't be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in gradients.items()}
    try:
        save_file(tensors, temporary, metadata={"identity": identity})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_gradients(path: Path, identity: str) -> dict[str, Float[Tensor, "_ _"]] | None:
    """What `save_gradients` wrote under this identity, mapped; None if it is not there."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("identity") != identity:
                return None
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def model_statistics(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    *,
    gradients: bool,
    path: Path | None = None,
    identity: str = "",
) -> ModelStatistics:
    """What is known about the dense model as a whole.

    Args:
        anatomy: the dense model.
        tokens: calibration windows.
        gradients: collect them, too.
        path: file that keeps gradients, and is read if it holds those of this identity; None to keep none.
        identity: what the gradients depend on, in one text.

    Raises:
        OSError, SafetensorError: if the file can't be written.
    """
    n_blocks = len(anatomy.blocks)
    if not gradients:
        return ModelStatistics(n_blocks, {})
    found = load_gradients(path, identity) if path else None
    if found is None:
        found = rms_gradients(anatomy, tokens)
        if path:
            save_gradients(path, found, identity)
    return ModelStatistics(n_blocks, found)
