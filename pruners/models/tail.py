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

from secateur.pruners.models.usable import check_finite

N_TOKENS = 2


@dataclass
class _Record:
    """One run: the last block's output, and the modules between it and the head."""

    hidden: Tensor | None = None
    n_outputs: int = 0
    after: list[nn.Module] = field(default_factory=list)
    head_ran: bool = False


def find_tail(
    model: nn.Module, container: nn.ModuleList, head: nn.Linear, config: Any
) -> tuple[nn.Sequential, Callable[[Tensor], Tensor], int]:
    """The modules from the last block to the head in order of use, and the head with its factor and soft cap.

    The result is checked: composed, it gives the model's own logits on the probe.

    Args:
        config: of the language tower.

    Returns:
        `tail`, from ``batch length width`` to the head's input; `logits`, from there to the logits; and the length of
        the tuple that the last block returns, 0 if it is a bare tensor.

    Raises:
        ValueError: if the model does something there that is neither a module nor a factor nor a soft cap.
    """
    tokens = torch.arange(N_TOKENS, device=head.weight.device)[None]
    with _recording(model, container, head) as record:
        wanted = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    check_finite(wanted, "logits of the dense model")
    tail = nn.Sequential(*record.after)
    if record.hidden is None or not record.head_ran:
        raise ValueError("Expected the model to run its last block and then its head, but it did not.")
    # The same kernels ran on the same numbers: only rounding may differ.
    tolerance = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    try:
        with torch.no_grad():
            plain = head(tail(record.hidden))
    except (RuntimeError, TypeError):  # the modules don't fit together
        plain = wanted.new_empty(0)
    if plain.shape == wanted.shape:
        for scaling in _scalings(config, plain, wanted):
            if torch.allclose(scaling(plain), wanted, rtol=0.0, atol=tolerance):
                return tail, partial(_logits, head, scaling), record.n_outputs
    names = ", ".join(type(module).__name__ for module in record.after) or "nothing"
    raise ValueError(
        f"Expected the last block's output to become logits through modules, the head, a constant factor and a soft "
        f"cap alone; found {names} before the head, which gives other logits than the model's."
    )


@dataclass(frozen=True)
class Scaling:
    """Logits as the model gives them, from those of the head.

    Args:
        cap: soft cap, as in Gemma 2 (https://arxiv.org/abs/2408.00118, section 2); None: none.
        factor: of all logits, as in Cohere.
        divisor: likewise, as in Granite.
    """

    cap: float | None = None
    factor: float = 1.0
    divisor: float = 1.0

    def __call__(self, logits: Float[Tensor, "... vocabulary"]) -> Float[Tensor, "... vocabulary"]:
        if self.cap is not None:
            return torch.tanh(logits / self.cap) * self.cap
        if self.divisor != 1:
            return logits / self.divisor
        return logits if self.factor == 1 else logits * self.factor


def _scalings(config: Any, plain: Tensor, wanted: Tensor) -> Iterator[Scaling]:
    """Possible steps between head and logits: nothing, a soft cap or a factor of the config, or a measured factor."""
    yield Scaling()
    values = config.to_dict().items()
    numbers = {name: float(x) for name, x in values if isinstance(x, float | int) and x > 0}
    yield from (Scaling(cap=value) for name, value in numbers.items() if "cap" in name)
    one, other = plain.double().flatten(), wanted.double().flatten()
    ratio = float(one @ other / (one @ one).clamp_min(1e-30))
    for value in numbers.values():
        if abs(value - ratio) < 1e-3 * abs(ratio):
            yield Scaling(factor=value)
        if abs(value * ratio - 1) < 1e-3:
            yield Scaling(divisor=value)
    yield Scaling(factor=float(f"{ratio:.6g}"))
    yield Scaling(factor=ratio)


def _logits(
    head: nn.Linear, scaling: Scaling, hidden: Float[Tensor, "... embedding"]
) -> Float[Tensor, "... vocabulary"]:
    return scaling(head(hidden))


@contextmanager
def _recording(model: nn.Module, container: nn.ModuleList, head: nn.Linear) -> Iterator[_Record]:
    """Context with hooks that fill a record, in evaluation mode and without gradients."""
    record = _Record()

    def at_last_block(module: nn.Module, args: Any, output: Any) -> None:
        record.hidden = output[0] if isinstance(output, tuple) else output
        record.n_outputs = len(output) if isinstance(output, tuple) else 0

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
