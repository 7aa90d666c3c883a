"""Places of the units of a sub-layer in its projections."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from secateur.pruners.models.anatomy import Block, Linear, Role, Sublayer

ALL = Fraction(1)
"""Share of query heads."""

Form = Literal["contiguous", "interleaved"]
FORMS: tuple[Form, ...] = ("contiguous", "interleaved")
"""Order in fused projections: all q, all k, all v (GPT-2, Phi3) or q, k, v of each head (GPT-NeoX)."""


@dataclass(frozen=True)
class Placement:
    """Places of the units in one projection.

    Its axis consists of one or more parts (more where projections are fused contiguously); a part holds so many
    consecutive entries of each unit, unit by unit.

    Args:
        linear: the projection.
        axis: 0 = units are rows of the ``out in`` weight, 1 = columns.
        parts: entries of one unit in each part.
        queries: entries of a KV group's query heads, with which its entries of the first part begin; 0: none.
    """

    linear: Linear
    axis: Literal[0, 1]
    parts: tuple[int, ...]
    queries: int = 0

    def first(
        self, tensor: Shaped[Tensor, "..."], n_kept: int, n_units: int, share: Fraction = ALL
    ) -> Shaped[Tensor, "..."]:
        """The first units of a weight, or of a bias: a view if there is one part, else a copy.

        Args:
            share: of the query heads of each unit, the first of which are kept; with fewer than all it is a copy.
        """
        axis = min(self.axis, tensor.ndim - 1)
        starts = [n_units * before for before in (0, *accumulate(self.parts))]
        pieces = [
            tensor.narrow(axis, start, n_kept * size) for start, size in zip(starts, self.parts, strict=False)
        ]
        if self.queries and share != ALL:
            by_unit = pieces[0].unflatten(axis, (n_kept, self.parts[0]))
            rest = by_unit.narrow(axis + 1, self.queries, self.parts[0] - self.queries)
            queries = by_unit.narrow(axis + 1, 0, int(self.queries * share))
            pieces[0] = torch.cat([queries, rest], axis + 1).flatten(axis, axis + 1)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def size(self, n_kept: int, share: Fraction = ALL) -> int:
        """Entries of the axis that `first` keeps."""
        return n_kept * (sum(self.parts) - self.queries + int(self.queries * share))

    def index(
        self, order: Int[Tensor, " units"], heads: Int[Tensor, "units heads"] | None = None
    ) -> Int[Tensor, " axis"]:
        """Entries of the axis when the units stand in this order.

        Args:
            heads: order of the query heads of each unit, by the unit's number; None: as they are.
        """
        n_units, start = order.numel(), 0
        found: list[Tensor] = []
        for size in self.parts:
            inside = torch.arange(size, device=order.device).expand(n_units, size)
            if heads is not None and self.queries and not found:
                width = self.queries // heads.shape[1]
                turned = (heads[:, :, None] * width + torch.arange(width, device=order.device)).flatten(1)
                inside = torch.cat([turned, inside[:, self.queries :]], 1)
            found.append((start + order[:, None] * size + inside[order]).flatten())
            start += n_units * size
        return torch.cat(found)

    def per_unit(self, values: Float[Tensor, " axis"], n_units: int) -> Float[Tensor, " units"]:
        """Sum over each unit's entries; of entries behind those of units nothing."""
        split = values[: n_units * sum(self.parts)].split([n_units * size for size in self.parts])
        return torch.stack([part.reshape(n_units, -1).sum(1) for part in split]).sum(0)

    def per_entry(self, values: Float[Tensor, " units"]) -> Float[Tensor, " axis"]:
        """Value of each entry's unit; 1 of entries behind those of units."""
        found = torch.cat([values.repeat_interleave(size) for size in self.parts])
        behind = self.linear.weight.shape[self.axis] - len(found)
        return torch.cat([found, found.new_ones(behind)])


def whole_placements(block: Block, kind: Sublayer, n_units: int) -> tuple[Placement, ...]:
    """Placements that share every projection out among units, of a sub-layer that is never cut to some of them."""
    mixer = block.mixer(kind)
    return tuple(
        Placement(x, int(x.is_output), ((x.in_features if x.is_output else x.out_features) // n_units,))  # type: ignore[arg-type]
        for x in (mixer.linears if mixer is not None else ())
    )


def place(block: Block, kind: Sublayer, form: Form) -> tuple[Placement, ...]:
    """The placements in one sub-layer if its fused projections have this form."""
    mixer = block.mixer(kind)
    return tuple(
        Placement(
            linear,
            1 if linear.is_output else 0,
            _parts(block, linear.role, form),
            _queries(block, linear.role),
        )
        for linear in (mixer.linears if mixer is not None else ())
        if linear.role != "in"  # made for all heads
    )


def place_vectors(block: Block) -> tuple[Placement, ...]:
    """Likewise in the vectors of an attention's query heads."""
    attention = block.mixer("attention")
    per_group = block.n_heads // max(block.n_kv_heads, 1)
    vectors = attention.vectors if attention is not None else ()
    return tuple(Placement(x, 0, (per_group,), per_group) for x in vectors)


def _parts(block: Block, role: Role, form: Form) -> tuple[int, ...]:
    head, queries = block.head_dim, block.head_dim * (block.n_heads // max(block.n_kv_heads, 1))
    parts: dict[Role, tuple[int, ...]] = {"o": (queries,), "k": (head,), "v": (head,), "gate_up": (1, 1)}
    parts |= {"q": (_queries(block, "q"),), "kv": (block.heads.kv_rows,), "qkv": (queries, head, head)}
    found = parts.get(role, (1,))  # of a channel
    return found if form == "contiguous" else (sum(found),)


def _queries(block: Block, role: Role) -> int:
    """Entries of a KV group's query heads in a projection, which come first."""
    width = (block.heads.query_rows or block.head_dim) if role == "q" else block.head_dim
    of_group = width * (block.n_heads // max(block.n_kv_heads, 1))
    return of_group if role in ("q", "qkv", "o") else 0
