"""Account of the parameters of a model's blocks: which are pruned, which are kept on purpose, which nobody knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.discover import is_norm

State = Literal["prunable", "kept", "not understood"]


@dataclass(frozen=True)
class ParameterRow:
    """Parameters of one kind in all blocks.

    Args:
        state: ``prunable``, ``kept`` on purpose, or ``not understood``.
        name: path within a block; numbers of experts as ``*``.
        kind: role of a projection, or what is kept: norm, bias, router, state, vector; "" if not understood.
        n_params: in all blocks together.
        share: of the parameters of all blocks, in [0, 1].
    """

    state: State
    name: str
    kind: str
    n_params: int
    share: float


def account(anatomy: Anatomy) -> tuple[ParameterRow, ...]:
    """Every parameter of every block, by its path within the block; the largest first in each state."""
    counts: dict[tuple[State, str, str], int] = {}
    for block in anatomy.blocks:
        roles = {f"{linear.name}.weight": f"{linear.sublayer} {linear.role}" for linear in block.linears}
        for path, parameter in block.module.named_parameters():
            full = f"{block.name}.{path}"
            state: State = "kept"
            if full in roles:
                state, kind = "prunable", roles[full]
            elif path in block.unknown:
                state, kind = "not understood", ""
            else:
                kind = _kept_kind(block, path)
            key = (state, re.sub(r"\.\d+\.", ".*.", path), kind)
            counts[key] = counts.get(key, 0) + parameter.numel()
    total = sum(counts.values())
    order: Sequence[State] = ("prunable", "kept", "not understood")
    rows = (ParameterRow(*key, n_params, n_params / total) for key, n_params in counts.items())
    return tuple(sorted(rows, key=lambda row: (order.index(row.state), -row.n_params)))


def unknown_share(rows: Sequence[ParameterRow]) -> float:
    """Share of the blocks' parameters that nobody knows."""
    return sum((row.share for row in rows if row.state == "not understood"), 0.0)


def zeros_of(anatomy: Anatomy) -> float:
    """Share of zeros among the prunable weights of the live model, as a dequantised one has some of its own."""
    zeros = sum(int((linear.weight == 0).sum()) for linear in anatomy.linears)
    return zeros / sum(linear.n_weights for linear in anatomy.linears)


def _kept_kind(block: Block, path: str) -> str:
    """Why a parameter is kept."""
    owner, _, own = path.rpartition(".")
    module: Any = block.module.get_submodule(owner)
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.Conv1d):
        return "convolution"
    if own == "bias":
        return "bias"
    child = path.partition(".")[0]
    kinds = {x.name.removeprefix(f"{block.name}.").partition(".")[0]: x.sublayer for x in block.linears}
    named = {"recurrent": "state", "experts": "router"}
    return named.get(kinds.get(child, ""), "vector")
