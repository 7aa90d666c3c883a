"""Projections of a block: every weight matrix in it, with the role that its name tells."""

from __future__ import annotations

from collections.abc import Collection
from typing import get_args

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.pruners.models.anatomy import Linear, Role, Sublayer

# Last part of a projection's path -> its role. Where families give one name to different things, the
# part before it belongs to the key. A wrong guess doesn't pass unseen: shapes are checked against the config.
NAMES: dict[str, tuple[Sublayer, Role]] = {
    "q_proj": ("attention", "q"),
    "k_proj": ("attention", "k"),
    "v_proj": ("attention", "v"),
    "qkv_proj": ("attention", "qkv"),  # Phi3
    "c_attn": ("attention", "qkv"),  # GPT-2
    "query_key_value": ("attention", "qkv"),  # GPT-NeoX
    "o_proj": ("attention", "o"),
    "out_proj": ("attention", "o"),  # OPT
    "attn.c_proj": ("attention", "o"),  # GPT-2
    "attention.dense": ("attention", "o"),  # GPT-NeoX
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "gate_up_proj": ("mlp", "gate_up"),  # Phi3
    "fc1": ("mlp", "up"),  # OPT
    "c_fc": ("mlp", "up"),  # GPT-2
    "dense_h_to_4h": ("mlp", "up"),  # GPT-NeoX
    "down_proj": ("mlp", "down"),
    "fc2": ("mlp", "down"),  # OPT
    "mlp.c_proj": ("mlp", "down"),  # GPT-2
    "dense_4h_to_h": ("mlp", "down"),  # GPT-NeoX
}

# What a block may consist of, in order of use.
COMPLETE: dict[Sublayer, tuple[tuple[Role, ...], ...]] = {
    "attention": (("q", "k", "v", "o"), ("qkv", "o")),
    "mlp": (("gate", "up", "down"), ("gate_up", "down"), ("up", "down")),
}


def find_linears(
    block: nn.Module, name: str, index: int, skipped: Collection[str] = ()
) -> tuple[Linear, ...]:
    """All projections of a block, attention's first, each sub-layer's in order of use.

    Nothing is skipped: a parameter with two or more dimensions that is no known projection (an expert of a
    mixture, a router, a convolution) is an error.

    Args:
        index: its place in the stack.
        skipped: sub-layers that the block is without.

    Raises:
        ValueError: on a weight that is no known projection, and on a sub-layer with a projection missing or
            there twice.
    """
    linears = [_read(block, name, path, index) for path, value in block.named_parameters() if value.ndim > 1]
    for sublayer, forms in COMPLETE.items():
        roles = sorted((linear.role for linear in linears if linear.sublayer == sublayer), key=_place)
        forms = ((),) if sublayer in skipped else forms
        if tuple(roles) not in forms:
            wanted = " or ".join("+".join(form) or "none" for form in forms)
            raise ValueError(
                f"Expected the projections {wanted} in the {sublayer}, got {'+'.join(roles) or 'none'} [at {name}]."
            )
    return tuple(sorted(linears, key=lambda linear: _place(linear.role)))


def _place(role: Role) -> int:
    return get_args(Role).index(role)


def _read(block: nn.Module, name: str, path: str, index: int) -> Linear:
    """The projection that owns the parameter `path` of a block."""
    owner, _, parameter = path.rpartition(".")
    parts = owner.split(".")
    known = NAMES.get(".".join(parts[-2:])) or NAMES.get(parts[-1])
    module = block.get_submodule(owner)
    if parameter != "weight" or known is None or not isinstance(module, nn.Linear | Conv1D):
        raise ValueError(
            f"Expected every weight matrix of a block to be a projection with a known name (such as "
            f"{', '.join(list(NAMES)[:4])}), got {path!r} in a {type(module).__name__} [at {name}]."
        )
    sublayer, role = known
    return Linear(f"{name}.{owner}", module, role, sublayer, index, isinstance(module, Conv1D))
