"""Curvature of the loss around the dense model: its second-order form for every option of every slot.

The loss of a change D of a projection's weight is foretold to second order, by the Fisher information of one pass over
few windows: 1/2 E[(g^T D x)^2] nats a token, x the projection's input at a token and g the gradient of its output
there, for labels drawn from the model's own distribution (the true Fisher). Tokens count as independent, as in K-FAC
(arXiv 1503.05671), but x and g do not: a token of huge activations, such as the first one of a window, has next to no
gradient, and the product of their second moments takes the one for the other. The form `E[(g^T D x)(g^T D' x)]` of
every two options of a slot is all that is kept: options squared numbers a slot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.fisher import walk_back
from secateur.pruners.models.anatomy import Linear
from secateur.pruners.options import AllOptions, SlotOptions
from secateur.pruners.pruner import OnBlock, Pruner, no_report
from secateur.pruners.stores.block_files import LevelStoreError, load_tensors, save_tensors

FILE = "curvature.safetensors"


@dataclass(frozen=True)
class Curvature:
    """Second-order form of every slot: ``E[(g^T D x)(g^T D' x)]`` of the changes D, D' from the dense model to options.

    Args:
        forms: by slot, ``options options``, symmetric, in nats a token; none for slots that change no weight.
    """

    forms: dict[int, Float[Tensor, "options options"]]

    def around(self, slot: int, position: int) -> Float[Tensor, " options"]:
        """Second-order effect of switching a slot from the option at this position to each of its options."""
        form = self.forms[slot].double()
        own = form.diagonal()
        return 0.5 * (own - 2 * form[:, position] + own[position]).clamp_min(0)


def load_curvature(directory: Path) -> Curvature:
    """The curvature in the directory of a store.

    Raises:
        LevelStoreError: if there is none.
    """
    found = load_tensors(directory / FILE, identity=None)
    if found is None:
        raise LevelStoreError(
            f"Expected the curvature of the levels in {directory / FILE}, got no such file."
        )
    return Curvature({int(slot): form for slot, form in found.items()})


def build_curvature(
    pruner: Pruner,
    directory: Path,
    tokens: Int[Tensor, "windows length"],
    on_block: OnBlock = no_report,
) -> None:
    """Write the curvature of all slots beside an open store, unless it is there; the model is dense, and is restored.

    One forward and one backward pass over the tokens, block by block: see `backward_blocks` for the memory; a block's
    inputs and gradients at all tokens and the options of one projection are held besides.

    Args:
        pruner: open, of a separable space.
        directory: of the store.
        tokens: few windows of the calibration set; 2,048 tokens do.
        on_block: told the number of blocks that are done, minus one.

    Raises:
        LevelStoreError: if there is no room on the disk.
        ValueError: if a gradient is not finite.
    """
    identity = _identity(pruner, tokens)
    if load_tensors(directory / FILE, identity) is not None:
        return
    options, calls, forms = AllOptions(pruner), Calls(), {}
    dense = {linear.name: linear.weight for linear in pruner.anatomy.linears}
    drawn = torch.Generator(device="cpu").manual_seed(pruner.seed)
    walk = walk_back(pruner.anatomy, tokens, calls.add, watched=options.watched, drawn=drawn)
    for n_done, block in enumerate(walk):
        for each in options.of(block.index):
            forms[str(each.slot)] = _form(each, calls, dense, tokens.numel())
        calls.clear()
        on_block(n_done)
    save_tensors(directory / FILE, forms, identity)


class Calls:
    """Inputs ``tokens in`` and gradients of outputs ``tokens out`` of each call of a block's projections."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, linear: Linear, inputs: Tensor, gradients: Tensor) -> None:
        self._found.setdefault(linear.name, []).append((inputs, gradients))

    def of(self, name: str) -> Sequence[tuple[Tensor, Tensor]]:
        """Calls of a projection; none for an expert without tokens."""
        return self._found.get(name, ())

    def clear(self) -> None:
        self._found.clear()


def _form(
    each: SlotOptions, calls: Calls, dense: dict[str, Tensor], n_tokens: int
) -> Float[Tensor, "options options"]:
    """Sum over the slot's projections of ``E[(g^T D x)(g^T D' x)]``."""
    total = torch.zeros(len(each.weights), len(each.weights), dtype=torch.float64)
    for name in each.weights[0]:
        changes = each.changes(name, dense[name]).view(-1, *dense[name].shape) if calls.of(name) else ()
        for inputs, gradients in calls.of(name):
            x, g = inputs.float(), gradients.float()
            slopes = torch.stack([slopes_of(x, g, change) for change in changes])
            total += (slopes @ slopes.T).cpu()
    return total / n_tokens


def slopes_of(
    inputs: Float[Tensor, "tokens in"],
    gradients: Float[Tensor, "tokens out"],
    change: Float[Tensor, "out in"],
) -> Float[Tensor, " tokens"]:
    """``g^T D x`` of each token, in float64."""
    return ((inputs @ change.T) * gradients).sum(-1).double()


def squared_slopes(
    inputs: Float[Tensor, "tokens in"],
    gradients: Float[Tensor, "tokens out"],
    change: Float[Tensor, "out in"],
) -> float:
    """Sum over tokens of ``(g^T D x)^2``."""
    return float(slopes_of(inputs, gradients, change).square().sum())


def _identity(pruner: Pruner, tokens: Int[Tensor, "windows length"]) -> str:
    """Everything that the curvature depends on, in one text."""
    space = pruner.space
    shares = [
        [space.share(slot, option) for option in space.options(slot)] for slot in range(len(space.slots))
    ]
    record = {
        "form": "tokens",
        "model": pruner.dense.fingerprint,
        "dtype": pruner.dense.dtype,
        "method": pruner.record(space.config(list(space.baselines().values())[1])),
        "slots": [*space.slots],
        "shares": shares,
        "tokens": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
        "seed": pruner.seed,
    }
    return json.dumps(record, sort_keys=True)
