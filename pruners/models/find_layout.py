"""Search for the layouts of a model's units, by cutting a block of each kind and comparing what it computes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from fractions import Fraction
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Anatomy, Block, Linear, Sublayer
from secateur.pruners.models.cutting import LiveSublayer, Piece, no_output, set_bias
from secateur.pruners.models.layout import (
    ALL,
    FORMS,
    BlockLayout,
    Form,
    MixtureLayout,
    Placement,
    SublayerLayout,
    place,
    plain_mlp,
    whole_placements,
)
from secateur.pruners.models.live_experts import live_part
from secateur.pruners.models.runner import BlockInputs, BlockRunner

N_TOKENS = 4
OUTPUTS: dict[Sublayer, str] = {"attention": "o", "recurrent": "o", "mlp": "down"}
OVER_TOKENS: tuple[Sublayer, ...] = ("attention", "recurrent")


class _Seen(NamedTuple):
    """First input and output of each module of a block in one run, by the module."""

    inputs: dict[nn.Module, Any]
    outputs: dict[nn.Module, Any]


class _Cuttable(NamedTuple):
    """Form of a sub-layer's fused projections, None if it is kept or removed as a whole; and `splits` of its layout."""

    form: Form | None
    splits: bool = False


@torch.no_grad()
def find_layouts(anatomy: Anatomy, *, experts: bool = False) -> tuple[BlockLayout, ...]:
    """Layouts of the KV groups and channels, and of routed experts, in every block of a dense model.

    No table of families is used. Norms are told by the modules that they feed; the form of fused projections, and
    that nothing else depends on the number of heads or their places, by cutting the first unit of one block of each
    kind, with the order of the others reversed: the inputs of the output projection must follow; and likewise the first
    query head of each KV group. What mixes tokens and can't be cut so, as a recurrent mixer or heads with a norm over
    all of them, is kept or removed as a whole. The model is not changed.

    Args:
        anatomy: of the model.
        experts: whether mixtures of experts are of use.

    Raises:
        ValueError: if a block has other parts, or its MLP can't be cut, e.g. as a norm runs over all channels.
    """
    for block in anatomy.blocks:
        _check_parts(block, anatomy.family, experts=experts)
    runner = BlockRunner(anatomy)
    ids = torch.arange(N_TOKENS, device=runner.device)[None] % anatomy.vocab_size
    training = anatomy.model.training
    anatomy.model.eval()
    try:
        inputs = runner.start(ids)
        seen = [_run(runner, block, inputs) for block in anatomy.blocks]
        forms: dict[Hashable, dict[Sublayer, _Cuttable]] = {}
        for block, run in zip(anatomy.blocks, seen, strict=True):
            if _kind(block) not in forms:
                kinds = [kind for kind in OUTPUTS if block.mixer(kind) is not None]
                forms[_kind(block)] = {kind: _form(runner, block, kind, inputs, run) for kind in kinds}
                shared = _shared_experts(block) if block.mixture else None
                if shared is not None and _same_without_first(runner, block, shared, inputs, run):
                    forms[_kind(block)]["experts"] = _Cuttable("contiguous")
        layouts = tuple(
            _layout(block, forms[_kind(block)], run) for block, run in zip(anatomy.blocks, seen, strict=True)
        )
        one_of_each = {_kind(layout.block): layout for layout in layouts}
        own = {kind: _own_norms(runner, layout, inputs) for kind, layout in one_of_each.items()}
        layouts = tuple(_with_norms(x, own[_kind(x.block)]) for x in layouts)
        one_of_each = {_kind(layout.block): layout for layout in layouts}
        does_nothing = {kind: _vanishes(runner, layout, inputs) for kind, layout in one_of_each.items()}
        layouts = tuple(
            x if does_nothing[_kind(x.block)] else replace(x, shared=_shared_norms(x.block, run))
            for x, run in zip(layouts, seen, strict=True)
        )
    finally:
        anatomy.model.train(training)
    return layouts


def _vanishes(runner: BlockRunner, layout: BlockLayout, inputs: BlockInputs) -> bool:
    """True if a block without both sub-layers does nothing: none of its norms is over the residual stream itself."""
    live = [live_part(part) for part in layout.parts]
    try:
        for one in live:
            one.remove()
        return torch.equal(runner.block(layout.block.index, inputs.hidden, inputs), inputs.hidden)
    finally:
        for one in live:
            one.restore()


def _own_norms(runner: BlockRunner, layout: BlockLayout, inputs: BlockInputs) -> tuple[bool, ...]:
    """One flag a sub-layer: True if its norms are removed with it; False where they norm the residual stream (MiniMax).

    Raises:
        ValueError: if the block without the sub-layer is not one in which the sub-layer gives zeros, either way.
    """
    found = []
    for part in layout.parts:
        ways = [part] if not part.norms else [part, replace(part, norms=())]
        works = [_is_zero(runner, layout.block, way, inputs) for way in ways]
        if not any(works):
            raise ValueError(
                f"Expected {part.name} to give what is added to the residual stream, got a module that does more, such "
                f"as adding it itself. This family ({runner.anatomy.family}) can't be cut."
            )
        found.append(works[0])
    return tuple(found)


def _with_norms(layout: BlockLayout, own: Sequence[bool]) -> BlockLayout:
    """The layout without norms that do not go with their sub-layer, see `_own_norms`."""
    attention, mlp = layout.attention, layout.mlp
    of_attention, of_mlp = own
    return replace(
        layout,
        attention=attention if of_attention else replace(attention, norms=()),
        mlp=mlp if of_mlp else replace(mlp, norms=()),
    )


def _is_zero(
    runner: BlockRunner, block: Block, part: SublayerLayout | MixtureLayout, inputs: BlockInputs
) -> bool:
    """True if a block without this sub-layer's module is one in which it gives zeros."""
    kinds = OVER_TOKENS if part.kind == "attention" else ("mlp", "experts")
    held = [(x, x.weight, x.bias) for x in block.linears if x.is_output and x.sublayer in kinds]
    names = {f"{block.name}.{name}": module for name, module in block.module.named_modules() if name}
    is_mlp = isinstance(part, SublayerLayout) and part.kind == "mlp"
    mlp = _owner(block, names, [x for x, _, _ in held]) if is_mlp else None
    live = live_part(part)
    try:
        for output, weight, bias in held:
            output.point_to(torch.zeros_like(weight))
            set_bias(output.module, None if bias is None else torch.zeros_like(bias))
        zeroed = runner.block(block.index, inputs.hidden, inputs)
        for output, weight, bias in held:
            output.point_to(weight)
            set_bias(output.module, bias)
        live.remove()
        with no_output(mlp) if mlp is not None else nullcontext():
            removed = runner.block(block.index, inputs.hidden, inputs)
    finally:
        live.restore()
    tolerance = 64 * torch.finfo(zeroed.dtype).eps * float(zeroed.nan_to_num().abs().max())
    finite = bool(torch.isfinite(zeroed).all())
    return not finite or torch.allclose(removed, zeroed, rtol=0.0, atol=tolerance)


def _check_parts(block: Block, family: str, *, experts: bool) -> None:
    """Raise a ValueError unless the block mixes tokens once, or twice in parallel, and has one MLP or mixture."""
    kinds = [mixer.kind for mixer in block.mixers]
    over_tokens = [kind for kind in kinds if kind in OVER_TOKENS]
    alone = [kind for kind in kinds if kind not in OVER_TOKENS]
    if over_tokens and alone == ["experts"] and block.mixture and not experts:
        raise ValueError(
            f"Expected blocks of one attention and one MLP, got a mixture of experts [at {block.name}]. Experts are "
            "units of the space architecture."
        )
    known = alone == ["mlp"] or (alone == ["experts"] and block.mixture is not None)
    if not over_tokens or len(set(over_tokens)) < len(over_tokens) or not known or block.unknown:
        found = [*kinds, *block.unknown]
        raise ValueError(
            f"Expected blocks of one attention and one MLP to cut, got {', '.join(found)} [at {block.name}]. "
            f"This family ({family}) can't be cut."
        )


def _kind(block: Block) -> Hashable:
    """Equal for blocks that are built alike."""
    linears = tuple((linear.role, tuple(linear.weight.shape)) for linear in block.linears)
    return tuple(type(module) for module in block.module.modules()), linears, block.window


def _layout(block: Block, forms: Mapping[Sublayer, _Cuttable], run: _Seen) -> BlockLayout:
    attention = _over_tokens(block, forms, run)
    mlp = (
        _mixture(block, run, shared="experts" in forms)
        if block.mixture
        else _sublayer(block, "mlp", forms["mlp"], run)
    )
    mlp_modules = {*mlp.modules}
    attention = replace(attention, further=tuple(x for x in attention.further if x not in mlp_modules))
    theirs = {*attention.modules, *mlp_modules}
    shared = (x for x in block.module.modules() if x not in theirs and [*x.parameters(recurse=False)])
    return BlockLayout(block, attention, mlp, tuple(shared))


def _over_tokens(block: Block, forms: Mapping[Sublayer, _Cuttable], run: _Seen) -> SublayerLayout:
    """Layout of what mixes tokens: attention, or a recurrent mixer as a whole; of both in parallel the attention's."""
    if block.mixer("attention") is None:
        return replace(_sublayer(block, "recurrent", forms["recurrent"], run), kind="attention")
    layout = _sublayer(block, "attention", forms["attention"], run)
    if block.mixer("recurrent") is None:
        return layout
    beside = _sublayer(block, "recurrent", forms["recurrent"], run)
    assert beside.owner is not None, "checked there"
    inside = {*layout.modules}
    return replace(
        layout,
        further=(*layout.further, *(x for x in dict.fromkeys(beside.modules) if x not in inside)),
        parallel=((beside.owner, beside.n_outputs),),
    )


def _mixture(block: Block, seen: _Seen, *, shared: bool) -> MixtureLayout:
    """Layout of the block's mixture; its owner is the child of the block that holds it."""
    mixture = block.mixture
    assert mixture is not None
    owner = next(child for child in block.module.children() if mixture.experts in set(child.modules()))
    routed = tuple(
        plain_mlp(f"expert {index} of {block.name}", [x for x in block.linears if x.expert is expert])
        for index, expert in enumerate(mixture.experts)
    )
    names = {f"{block.name}.{name}": module for name, module in block.module.named_modules()}
    norms = tuple(
        norm
        for norm in (names[name] for name in block.norms)
        if norm in set(owner.modules())
        or seen.outputs[norm] is seen.inputs[owner]
        or seen.inputs[norm] is seen.outputs[owner]
    )
    returned = seen.outputs[owner]
    n_outputs = len(returned) if isinstance(returned, tuple) else 0
    assert all(routed), "split experts are plain MLPs"
    return MixtureLayout(
        f"the experts of {block.name}",
        mixture,
        owner,
        norms,
        n_outputs,
        tuple(expert for expert in routed if expert is not None),
        _shared_experts(block) if shared else None,
    )


def _shared_experts(block: Block) -> SublayerLayout | None:
    """Layout of the shared experts of a block in channels, if they are a plain MLP."""
    linears = [x for x in block.linears if x.sublayer == "experts" and x.expert is None]
    return plain_mlp(f"the shared experts of {block.name}", linears)


def _form(runner: BlockRunner, block: Block, kind: Sublayer, inputs: BlockInputs, dense: _Seen) -> _Cuttable:
    """The first form under which a cut block computes the values of the dense one.

    None: of what mixes tokens and can only be kept or removed as a whole.
    """
    if kind == "recurrent" or (kind == "attention" and not block.n_kv_heads):
        return _Cuttable(None)
    for form in FORMS:
        layout = _sublayer(block, kind, _Cuttable(form), dense)
        if layout.n_units == 1 or _same_without_first(runner, block, layout, inputs, dense):
            several = kind == "attention" and layout.heads_per_group > 1
            return _Cuttable(form, several and _same_without_queries(runner, block, layout, inputs, dense))
    if kind == "attention":
        return _Cuttable(None)
    raise ValueError(
        f"Expected the units of {_name(block, kind)} to be alike, independent of each other and found in "
        f"{', '.join(placement.linear.name for placement in place(block, kind, FORMS[0]))}, but the block without one "
        f"of them computes other values for the rest. This family ({runner.anatomy.family}) can't be cut."
    )


def _same_without_first(
    runner: BlockRunner, block: Block, layout: SublayerLayout, inputs: BlockInputs, dense: _Seen
) -> bool:
    """True if the units from the last to the second, in this order, compute the same as in the dense block."""
    backwards = torch.arange(layout.n_units - 1, -1, -1, device=runner.device)
    columns = layout.placements[-1].index(backwards)[: -layout.unit_width]
    pieces = _ordered(layout, backwards, None, layout.n_units - 1, ALL)
    return _same_inputs(runner, block, layout, inputs, dense, (layout.n_units - 1, pieces, 0), columns)


def _same_without_queries(
    runner: BlockRunner, block: Block, layout: SublayerLayout, inputs: BlockInputs, dense: _Seen
) -> bool:
    """Likewise if the query heads of each KV group stand in reversed order, without the first one."""
    n_units, n_kept, device = layout.n_units, layout.heads_per_group - 1, runner.device
    order, share = torch.arange(n_units, device=device), layout.share_of(n_kept)
    heads = torch.arange(n_kept, -1, -1, device=device).expand(n_units, -1)
    output = layout.placements[-1]
    columns = output.first(output.index(order, heads), n_units, n_units, share)
    pieces = _ordered(layout, order, heads, n_units, share)
    return _same_inputs(runner, block, layout, inputs, dense, (n_units, pieces, n_kept), columns)


def _same_inputs(
    runner: BlockRunner,
    block: Block,
    layout: SublayerLayout,
    inputs: BlockInputs,
    dense: _Seen,
    cut: tuple[int, Mapping[str, Piece], int],
    columns: Int[Tensor, " kept"],
) -> bool:
    """True if the cut block gives its output projection the values of these columns in the dense one."""
    live = LiveSublayer(layout)
    try:
        live.cut(*cut)
        seen = _run(runner, block, inputs)
    except (RuntimeError, ValueError, TypeError):  # shapes that don't fit: another form, or another family
        return False
    finally:
        live.restore()
    module = layout.output.module
    wanted, got = dense.inputs[module][..., columns], seen.inputs[module]
    tolerance = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    return got.shape == wanted.shape and torch.allclose(got, wanted, rtol=0.0, atol=tolerance)


def _ordered(
    layout: SublayerLayout,
    order: Int[Tensor, " units"],
    heads: Int[Tensor, "units heads"] | None,
    n_kept: int,
    share: Fraction,
) -> dict[str, Piece]:
    """The live weights with their units, and the query heads in them, in this order: the first of them."""
    n_units, pieces = layout.n_units, {}
    for placement in layout.placements:
        index = placement.index(order, heads)
        bias = placement.linear.bias
        if bias is not None and placement.axis == 0:
            bias = placement.first(bias[index], n_kept, n_units, share)
        weight = placement.linear.weight.index_select(placement.axis, index)
        pieces[placement.linear.name] = Piece(placement.first(weight, n_kept, n_units, share), bias)
    return pieces


def _sublayer(block: Block, kind: Sublayer, cuttable: _Cuttable, seen: _Seen) -> SublayerLayout:
    form = cuttable.form
    n_units = {"attention": block.attention_units, "mlp": block.ffn_width}.get(kind, 1)
    placements = whole_placements(block, kind, n_units) if form is None else place(block, kind, form)
    names = {f"{block.name}.{name}": module for name, module in block.module.named_modules() if name}
    inside = _owner(block, names, [x.linear for x in placements])
    owner = inside if kind in OVER_TOKENS else None
    if kind in OVER_TOKENS and owner is None:
        raise ValueError(f"Expected the {kind} to have a module of its own, got none [at {block.name}].")
    returned = seen.outputs[owner] if owner is not None else None
    if kind == "recurrent" and isinstance(returned, tuple) and any(x is not None for x in returned[1:]):
        raise ValueError(
            f"Expected a recurrent mixer that gives hidden states alone, got {type(owner).__name__}, which gives its "
            f"state, too [at {block.name}]. Such mixers can't be removed, and this family can't be cut."
        )
    norms = _norms(block, [names[name] for name in block.norms], placements, owner, seen)
    theirs = {*norms, *(x.linear.module for x in placements)}
    below = inside.modules() if inside is not None else ()
    return SublayerLayout(
        name=_name(block, kind),
        kind=kind,
        n_units=n_units,
        placements=placements,
        norms=norms,
        owner=owner,
        n_outputs=len(returned) if isinstance(returned, tuple) else 0,
        head_dim=block.head_dim,
        heads_per_group=block.n_heads // block.attention_units,
        rigid=form is None,
        splits=cuttable.splits,
        further=tuple(x for x in below if x not in theirs and [*x.parameters(recurse=False)]),
    )


def _owner(block: Block, names: Mapping[str, nn.Module], linears: Sequence[Linear]) -> nn.Module | None:
    """The innermost module below the block that all these projections are in; None if there is none."""
    paths = [x.name.split(".")[:-1] for x in linears]
    common = list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    return names.get(".".join(part for part, *_ in common))


def _norms(
    block: Block,
    norms: Sequence[nn.Module],
    placements: Sequence[Placement],
    owner: nn.Module | None,
    seen: _Seen,
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


def _shared_norms(block: Block, seen: _Seen) -> tuple[nn.Module, ...]:
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


def _name(block: Block, kind: Sublayer) -> str:
    return f"the {kind} of {block.name}"


def _run(runner: BlockRunner, block: Block, inputs: BlockInputs) -> _Seen:
    """One run of a block, with hooks on its modules."""
    seen = _Seen({}, {})

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.inputs[module] = args[0] if args else next(iter(kwargs.values()), None)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.outputs[module] = output

    with ExitStack() as hooks:
        for module in block.module.modules():
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        runner.block(block.index, inputs.hidden, inputs)
    return seen
