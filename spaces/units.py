"""What can be switched: the prunable linears of a model as plain data, grouped into units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Granularity = Literal["linear", "sublayer", "block"]


@dataclass(frozen=True)
class Prunable:
    """One linear of a block, as plain data.

    Args:
        name: its full path in the model.
        block: index of its block, from 0.
        sublayer: e.g. ``attention`` or ``mlp``.
        n_weights: number of its weights, > 0.
    """

    name: str
    block: int
    sublayer: str
    n_weights: int

    def __post_init__(self) -> None:
        if self.n_weights <= 0:
            raise ValueError(f"Expected `n_weights` > 0, got {self.n_weights} at {self.name}.")


@dataclass(frozen=True)
class Unit:
    """Linears that switch their level together: one slot of a space.

    Args:
        name: unique in the space.
        sizes: number of weights of each member.
        block: index of the block it is in.
        members: full names of the linears, one a size.
    """

    name: str
    sizes: tuple[int, ...]
    block: int
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.members or len(self.members) != len(self.sizes):
            raise ValueError(
                f"Expected a size for each of the members, got {len(self.sizes)} sizes and "
                f"{len(self.members)} members at {self.name}."
            )


def unit_name(linear: Prunable, granularity: Granularity) -> str:
    """Name of the unit that the linear belongs to, e.g. ``block3.mlp``."""
    names = {
        "linear": linear.name,
        "sublayer": f"block{linear.block}.{linear.sublayer}",
        "block": f"block{linear.block}",
    }
    return names[granularity]


def group(linears: Sequence[Prunable], granularity: Granularity) -> tuple[Unit, ...]:
    """The units that these linears form, in the order of their first members."""
    members: dict[str, list[Prunable]] = {}
    for linear in linears:
        members.setdefault(unit_name(linear, granularity), []).append(linear)
    return tuple(
        Unit(name, tuple(m.n_weights for m in group), group[0].block, tuple(m.name for m in group))
        for name, group in members.items()
    )


def split_protected(
    linears: Sequence[Prunable], patterns: Sequence[str]
) -> tuple[tuple[Prunable, ...], tuple[Prunable, ...]]:
    """The linears that may be pruned, and those whose full name matches a pattern (as in `fnmatch`).

    Raises:
        ValueError: if a pattern matches no linear, or nothing is left to prune.
    """
    for pattern in patterns:
        if not any(fnmatchcase(linear.name, pattern) for linear in linears):
            raise ValueError(
                f"Expected each pattern in `protect` to match a linear, got {pattern!r}, which matches none. "
                f"Linears are named as in {linears[0].name!r}."
            )
    protected = tuple(x for x in linears if any(fnmatchcase(x.name, pattern) for pattern in patterns))
    free = tuple(x for x in linears if x not in protected)
    if not free:
        raise ValueError(
            f"Expected `protect` to leave linears to prune, got {list(patterns)}, which match all "
            f"{len(linears)}. Give narrower patterns."
        )
    return free, protected
