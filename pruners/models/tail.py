"""Steps of a causal LM after its last block, found by one run on a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

N_TOKENS = 2


@dataclass
class _Record:
    """One run: the last block's output, and the modules between it and the head."""

    hidden: Tensor | None = None
    after: list[nn.Module] = field(default_factory=list)
    head_ran: bool = False


def find_tail(
    model: nn.Module, container: nn.ModuleList, head: nn.Linear
) -> tuple[nn.Sequential, Callable[[Tensor], Tensor]]:
    """The modules from the last block to the head in order of use, and the head with its soft cap.

    The result is checked: composed, it gives the model's own logits on the probe.

    Returns:
        `tail`, from ``batch length width`` to the head's input, and `logits`, from there to the logits.

    Raises:
        ValueError: if the model does something there that is neither a module nor a soft cap.
    """
    tokens = torch.arange(N_TOKENS, device=head.weight.device)[None]
    with _recording(model, container, head) as record:
        wanted = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    tail = nn.Sequential(*record.after)
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = partial(_logits, head, cap)
    if record.hidden is None or not record.head_ran:
        raise ValueError("Expected the model to run its last block and then its head, but it did not.")
    try:
        with torch.no_grad():
            got = logits(tail(record.hidden))
    except (RuntimeError, TypeError):  # the modules don't fit together
        got = None
    # The same kernels ran on the same numbers: only rounding may differ.
    tolerance = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    if got is None or got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=0.0, atol=tolerance):
        names = ", ".join(type(module).__name__ for module in record.after) or "nothing"
        raise ValueError(
            f"Expected the last block's output to become logits through modules, the head and a soft cap alone; "
            f"found {names} before the head, which gives other logits than the model's."
        )
    return tail, logits


def _logits(
    head: nn.Linear, cap: float | None, hidden: Float[Tensor, "... embedding"]
) -> Float[Tensor, "... vocabulary"]:
    """Logits from the head's input, soft-capped as in Gemma 2 (https://arxiv.org/abs/2408.00118, section 2)."""
    logits: Tensor = head(hidden)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@contextmanager
def _recording(model: nn.Module, container: nn.ModuleList, head: nn.Linear) -> Iterator[_Record]:
    """Context with hooks that fill a record, in evaluation mode and without gradients."""
    record = _Record()

    def at_last_block(module: nn.Module, args: Any, output: Any) -> None:
        record.hidden = output[0] if isinstance(output, tuple) else output

    def elsewhere(module: nn.Module, args: Any, output: Any) -> None:
        if module is head:
            record.head_ran = record.hidden is not None
        elif record.hidden is not None and not record.head_ran:
            record.after.append(module)

    inside = set(container.modules())
    leaves = [module for module in model.modules() if module not in inside and not list(module.children())]
    handles = [module.register_forward_hook(elsewhere) for module in leaves]
    handles.append(container[-1].register_forward_hook(at_last_block))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield record
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
