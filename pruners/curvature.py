"""Curvature of the loss around the dense model: its second-order form for every option of every slot.

The loss of a change D of a projection's weight is foretold to second order, by the Kronecker-factored Fisher
information (K-FAC, arXiv 1503.05671) of one pass over few windows: 1/2 tr(B D A D^T) nats a token, A the second moment
of the projection's inputs and B that of the gradients of its outputs, for labels drawn from the model's own
distribution. The form `tr(B D A D'^T)` of every two options of a slot is all that is kept: options squared numbers a
slot.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.fisher import Moments, walk_back
from secateur.pruners.options import AllOptions, SlotOptions
from secateur.pruners.pruner import OnBlock, Pruner, no_report
from secateur.pruners.stores.block_files import LevelStoreError, load_tensors, save_tensors

FILE = "curvature.safetensors"


@dataclass(frozen=True)
class Curvature:
    """Second-order form of every slot: ``tr(B D A D'^T)`` of the changes D, D' from the dense model to two options.

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
    moments and the options of one projection are held besides.

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
    options, moments, forms = AllOptions(pruner), Moments(), {}
    dense = {linear.name: linear.weight for linear in pruner.anatomy.linears}
    drawn = torch.Generator(device="cpu").manual_seed(pruner.seed)
    walk = walk_back(pruner.anatomy, tokens, moments.add, watched=options.watched, drawn=drawn)
    for n_done, block in enumerate(walk):
        for each in options.of(block.index):
            forms[str(each.slot)] = _form(each, moments, dense, tokens.numel())
        moments.clear()
        on_block(n_done)
    save_tensors(directory / FILE, forms, identity)


def _form(
    each: SlotOptions, moments: Moments, dense: dict[str, Tensor], n_tokens: int
) -> Float[Tensor, "options options"]:
    """Sum over the slot's projections of ``tr(B D A D'^T)``."""
    total = torch.zeros(len(each.weights), len(each.weights), dtype=torch.float64)
    for name in each.weights[0]:
        if name not in moments.inputs:  # never called, as an expert without tokens
            continue
        changes = each.changes(name, dense[name])
        inputs, gradients = moments.inputs[name] / n_tokens, moments.gradients[name] / n_tokens
        pushed = [(gradients @ change.view_as(dense[name]) @ inputs).flatten() for change in changes]
        total += (torch.stack(pushed) @ changes.T).double().cpu()
    return (total + total.T) / 2


def _identity(pruner: Pruner, tokens: Int[Tensor, "windows length"]) -> str:
    """Everything that the curvature depends on, in one text."""
    space = pruner.space
    shares = [
        [space.share(slot, option) for option in space.options(slot)] for slot in range(len(space.slots))
    ]
    record = {
        "model": pruner.dense.fingerprint,
        "dtype": pruner.dense.dtype,
        "method": pruner.record(space.config(list(space.baselines().values())[1])),
        "slots": [*space.slots],
        "shares": shares,
        "tokens": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
        "seed": pruner.seed,
    }
    return json.dumps(record, sort_keys=True)
