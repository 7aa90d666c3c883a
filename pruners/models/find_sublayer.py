"""Layout of one sub-layer of a block: its units, its module, and the norms that go with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from torch import nn

from secateur.pruners.models.anatomy import Block, Linear, Sublayer
from secateur.pruners.models.layout import Returns, SublayerLayout
from secateur.pruners.models.observed import Seen, returns_of
from secateur.pruners.models.placement import Form, Placement, place, place_vectors, whole_placements

OVER_TOKENS: tuple[Sublayer, ...] = ("attention", "recurrent")


class Cuttable(NamedTuple):
    """Form of a sub-layer's fused projections, None if it is kept or removed as a whole; and `splits` of its layout."""

    form: Form | None
    splits: bool = False


def sublayer_of(block: Block, kind: Sublayer, cuttable: Cuttable, seen: Seen) -> SublayerLayout:
    """Layout of a sub-layer that can be cut so.

    Raises:
        ValueError: if what mixes tokens has no module of its own.
    """
    form = cuttable.form
    n_units = {"attention": block.attention_units, "mlp": block.ffn_width}.get(kind, 1)
    placements = whole_placements(block, kind, n_units) if form is None else place(block, kind, form)
    names = {f"{block.name}.{name}": module for name, module in block.module.named_modules() if name}
    inside = owner_of(block, names, [x.linear for x in placements])
    owner = inside if kind in OVER_TOKENS else None
    if kind in OVER_TOKENS and owner is None:
        raise ValueError(f"Expected the {kind} to have a module of its own, got none [at {block.name}].")
    vectors = place_vectors(block) if kind == "attention" and form is not None else ()
    norms = _norms(block, [names[name] for name in block.norms], placements, owner, seen)
    theirs = {*norms, *(x.linear.module for x in (*placements, *vectors))}
    below = inside.modules() if inside is not None else ()
    return SublayerLayout(
        name=name_of(block, kind),
        kind=kind,
        n_units=n_units,
        placements=placements,
        norms=norms,
        owner=owner,
        returns=Returns() if inside is None else returns_of(inside, seen),
        head_dim=block.head_dim,
        heads_per_group=block.n_heads // max(block.attention_units, 1),
        rigid=form is None,
        splits=cuttable.splits,
        vectors=vectors,
        further=tuple(x for x in below if x not in theirs and [*x.parameters(recurse=False)]),
    )


def owner_of(block: Block, names: Mapping[str, nn.Module], linears: Sequence[Linear]) -> nn.Module | None:
    """The innermost module below the block that all these projections are in; None if there is none."""
    paths = [x.name.split(".")[:-1] for x in linears]
    common = list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    return names.get(".".join(part for part, *_ in common))


def _norms(
    block: Block,
    norms: Sequence[nn.Module],
    placements: Sequence[Placement],
    owner: nn.Module | None,
    seen: Seen,
) -> tuple[nn.Module, ...]:
    """Norms whose output only this sub-layer reads, whose input is its output, or that are inside its module.

    A norm of the whole residual stream, as in models that normalise after the addition, serves no sub-layer; nor does
    one that both sub-layers read, see `_shared_norms`.
    """
    output = placements[-1].linear
    readers = [x.module for x in block.linears if x.sublayer == output.sublayer]
    inside = set(owner.modules()) if owner is not None else set()
    shared = _shared_norms(block, seen)
    return tuple(
        norm
        for norm in norms
        if norm not in shared
        and (
            norm in inside
            or any(seen.outputs.get(norm, norm) is seen.inputs.get(reader) for reader in readers)
            or seen.inputs.get(norm, norm) is seen.outputs.get(output.module)
        )
    )


def _shared_norms(block: Block, seen: Seen) -> tuple[nn.Module, ...]:
    """Norms that both sub-layers read, as where attention and MLP are parallel (Cohere, GPT-J, Falcon)."""
    names = {f"{block.name}.{name}": module for name, module in block.module.named_modules()}
    readers = {
        names[name]: {
            x.sublayer in OVER_TOKENS
            for x in block.linears
            if seen.inputs.get(x.module) is seen.outputs.get(names[name], x)
        }
        for name in block.norms
    }
    return tuple(norm for norm, kinds in readers.items() if len(kinds) > 1)


def name_of(block: Block, kind: Sublayer) -> str:
    """Name of a sub-layer in errors."""
    return f"the {kind} of {block.name}"
