"""Roles of the projections of a mixer: by their names where these are common, else by their shapes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.pruners.models.anatomy import Mixer, Role, Sublayer

# Last part of a projection's path -> its role. Where families give one name to different things, the
# part before it belongs to the key. A wrong guess doesn't pass unseen: shapes are checked.
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

# What an attention and an MLP may consist of, in order of use.
COMPLETE: dict[Sublayer, tuple[tuple[Role, ...], ...]] = {
    "attention": (("q", "k", "v", "o"), ("q", "k", "o"), ("qkv", "o")),  # k may serve as v, too (Gemma 4)
    "mlp": (("gate", "up", "down"), ("gate_up", "down"), ("up", "down")),
}

Told = tuple[Sublayer, list[Role]]
"""Kind of a mixer, and the roles of its projections."""


def roles_of(
    modules: Sequence[tuple[str, nn.Module]], name: str, *, attends: bool, partly: bool = False
) -> Told | None:
    """Kind and roles of the projections of one mixer; None if they are of no kind.

    Args:
        modules: the projections with their paths within the block, in the order in which the family has them.
        name: of the block.
        attends: the mixer's class is an attention.
        partly: they need not be complete.

    Raises:
        ValueError: if all names are common ones, of one kind, with a projection missing or there twice.
    """
    known = [_named(path) for path, _ in modules]
    kinds = {told[0] for told in known if told is not None}
    roles = [None if told is None else told[1] for told in known]
    if len(kinds) > 1:
        return None
    kind: Sublayer = kinds.pop() if kinds else "attention" if attends else "mlp"
    if partly:
        return (kind, [role for role in roles if role]) if all(roles) else None
    if None not in roles:
        _check(kind, [role for role in roles if role], name)
        return kind, [role for role in roles if role]
    filled = _filled(kind, roles, modules)
    return None if filled is None else (kind, filled)


def check_complete(mixers: Sequence[Mixer], name: str, skipped: Collection[str]) -> None:
    """Raise a ValueError if a block has no projections at all, or some of what it should be without."""
    kinds = [mixer.kind for mixer in mixers]
    for kind in skipped:
        if kind in kinds:
            raise ValueError(f"Expected no projections in the {kind}, got some [at {name}].")
    if not kinds and len(skipped) < len(COMPLETE):
        raise ValueError(f"Expected projections in an attention or an MLP, got none [at {name}].")


def _named(path: str) -> tuple[Sublayer, Role] | None:
    parts = path.split(".")
    return NAMES.get(".".join(parts[-2:])) or NAMES.get(parts[-1])


def _check(kind: Sublayer, roles: Sequence[Role], name: str) -> None:
    forms = COMPLETE[kind]
    if not any(sorted(roles) == sorted(form) for form in forms):
        wanted = " or ".join("+".join(form) for form in forms)
        order: list[str] = [role for form in forms for role in form]
        got = "+".join(sorted(roles, key=order.index))
        raise ValueError(f"Expected the projections {wanted} in the {kind}, got {got} [at {name}].")


def _filled(
    kind: Sublayer, roles: Sequence[Role | None], modules: Sequence[tuple[str, nn.Module]]
) -> list[Role] | None:
    """The roles, with those of unknown names from the one form that they and the shapes leave."""
    for form in COMPLETE[kind]:
        missing = [role for role in form if role not in roles]
        if len(form) != len(roles) or len(missing) != roles.count(None):
            continue
        rest = iter(missing)
        found = [next(rest) if role is None else role for role in roles]
        if _fits(dict(zip(found, (_shape(module) for _, module in modules), strict=True))):
            return found
    return None


def _fits(shapes: dict[Role, tuple[int, int]]) -> bool:
    """True if these shapes (out, in) of an attention or an MLP go together."""
    width, inner = shapes["down"] if "down" in shapes else shapes["o"]
    rows = {"gate": inner, "up": inner, "gate_up": 2 * inner}
    read = all(shape[1] == width for role, shape in shapes.items() if role not in ("down", "o"))
    return read and all(shapes[role][0] == n for role, n in rows.items() if role in shapes)


def _shape(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a projection."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
