"""Search for the layouts of a model's units, by cutting a block of each kind and comparing what it computes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.pruners.models.anatomy import Anatomy, Block, Sublayer
from secateur.pruners.models.find_form import find_form, same_without_first
from secateur.pruners.models.find_sublayer import OVER_TOKENS, Cuttable, sublayer_of
from secateur.pruners.models.layout import BlockLayout, MixtureLayout, SublayerLayout, plain_mlp
from secateur.pruners.models.observed import Seen, observe, returns_of
from secateur.pruners.models.removal import own_norms, vanishes
from secateur.pruners.models.runner import BlockRunner

N_TOKENS = 4
OUTPUTS: dict[Sublayer, str] = {"attention": "o", "recurrent": "o", "mlp": "down"}


@torch.no_grad()
def find_layouts(anatomy: Anatomy, *, experts: bool = False) -> tuple[BlockLayout, ...]:
    """Layouts of the KV groups and channels, and of routed experts, in every block of a dense model.

    No table of families is used. Norms are told by the modules that they feed; the form of fused projections, and
    that nothing else depends on the number of heads or their places, by cutting the first unit of one block of each
    kind, with the order of the others reversed: the inputs of the output projection must follow; and likewise the first
    query head of each KV group. What can't be cut so, as a recurrent mixer, or heads or channels with a norm over
    all of them, is kept or removed as a whole. The model is not changed.

    Args:
        anatomy: of the model.
        experts: whether mixtures of experts are of use.

    Raises:
        ValueError: if a block has other parts, or a sub-layer that can't be removed.
    """
    for block in anatomy.blocks:
        _check_parts(block, anatomy.family, experts=experts)
    runner = BlockRunner(anatomy)
    ids = torch.arange(N_TOKENS, device=runner.device)[None] % anatomy.vocab_size
    training = anatomy.model.training
    anatomy.model.eval()
    try:
        inputs = runner.start(ids)
        seen = [observe(runner, block, inputs) for block in anatomy.blocks]
        forms: dict[Hashable, dict[Sublayer, Cuttable]] = {}
        for block, run in zip(anatomy.blocks, seen, strict=True):
            if _kind(block) not in forms:
                kinds = [kind for kind in OUTPUTS if block.mixer(kind) is not None]
                forms[_kind(block)] = {kind: find_form(runner, block, kind, inputs, run) for kind in kinds}
                shared = _shared_experts(block) if block.mixture else None
                if shared is not None and same_without_first(runner, block, shared, inputs, run):
                    forms[_kind(block)]["experts"] = Cuttable("contiguous")
        layouts = tuple(
            _layout(block, forms[_kind(block)], run) for block, run in zip(anatomy.blocks, seen, strict=True)
        )
        one_of_each = {_kind(layout.block): layout for layout in layouts}
        own = {kind: own_norms(runner, layout, inputs) for kind, layout in one_of_each.items()}
        layouts = tuple(_with_shared(_with_norms(x, *own[_kind(x.block)])) for x in layouts)
        one_of_each = {_kind(layout.block): layout for layout in layouts}
        does_nothing = {kind: vanishes(runner, layout, inputs) for kind, layout in one_of_each.items()}
        layouts = tuple(replace(x, vanishes=does_nothing[_kind(x.block)]) for x in layouts)
    finally:
        anatomy.model.train(training)
    return layouts


def _with_norms(layout: BlockLayout, *own: bool) -> BlockLayout:
    """The layout without norms that do not go with their sub-layer, see `own_norms`."""
    for part, is_own in zip(layout.parts, own, strict=True):
        if is_own:
            continue
        bare: Any = replace(part, norms=())
        layout = replace(layout, attention=bare) if part is layout.attention else replace(layout, mlp=bare)
    return layout


def _check_parts(block: Block, family: str, *, experts: bool) -> None:
    """Raise a ValueError unless the block mixes tokens at most once, or twice in parallel, and has at most one MLP."""
    kinds = [mixer.kind for mixer in block.mixers]
    over_tokens = [kind for kind in kinds if kind in OVER_TOKENS]
    alone = [kind for kind in kinds if kind not in OVER_TOKENS]
    if alone == ["experts"] and block.mixture and not experts:
        raise ValueError(
            f"Expected blocks of one attention and one MLP, got a mixture of experts [at {block.name}]. Experts are "
            "units of the space architecture."
        )
    known = alone in ([], ["mlp"]) or (alone == ["experts"] and block.mixture is not None)
    if not kinds or len(set(over_tokens)) < len(over_tokens) or not known or block.unknown:
        found = [*kinds, *block.unknown]
        raise ValueError(
            f"Expected blocks of one attention and one MLP, or one of them, to cut, got {', '.join(found)} "
            f"[at {block.name}]. This family ({family}) can't be cut."
        )


def _kind(block: Block) -> Hashable:
    """Equal for blocks that are built alike."""
    linears = tuple((linear.role, tuple(linear.weight.shape)) for linear in block.linears)
    return tuple(type(module) for module in block.module.modules()), linears, block.window


def _layout(block: Block, forms: Mapping[Sublayer, Cuttable], run: Seen) -> BlockLayout:
    attention, mlp = _over_tokens(block, forms, run), _mlp(block, forms, run)
    theirs = {*mlp.modules} if mlp is not None else set()
    if attention is not None:
        attention = replace(attention, further=tuple(x for x in attention.further if x not in theirs))
    return BlockLayout(block, attention, mlp)


def _with_shared(layout: BlockLayout) -> BlockLayout:
    """The layout with the modules that are of no sub-layer."""
    theirs = {module for part in layout.parts for module in part.modules}
    modules = (x for x in layout.block.module.modules() if x not in theirs)
    return replace(layout, shared=tuple(x for x in modules if [*x.parameters(recurse=False)]))


def _mlp(
    block: Block, forms: Mapping[Sublayer, Cuttable], run: Seen
) -> SublayerLayout | MixtureLayout | None:
    """Layout of the MLP or mixture; None in a block without."""
    if block.mixture is not None:
        return _mixture(block, run, shared="experts" in forms)
    return sublayer_of(block, "mlp", forms["mlp"], run) if "mlp" in forms else None


def _over_tokens(block: Block, forms: Mapping[Sublayer, Cuttable], run: Seen) -> SublayerLayout | None:
    """Layout of what mixes tokens: attention, or a recurrent mixer as a whole; of both in parallel the attention's.

    None in a block where nothing does.
    """
    if not forms.keys() & {*OVER_TOKENS}:
        return None
    if block.mixer("attention") is None:
        return replace(sublayer_of(block, "recurrent", forms["recurrent"], run), kind="attention")
    layout = sublayer_of(block, "attention", forms["attention"], run)
    if block.mixer("recurrent") is None:
        return layout
    beside = sublayer_of(block, "recurrent", forms["recurrent"], run)
    assert beside.owner is not None, "checked there"
    inside = {*layout.modules}
    return replace(
        layout,
        further=(*layout.further, *(x for x in dict.fromkeys(beside.modules) if x not in inside)),
        parallel=((beside.owner, beside.returns),),
    )


def _mixture(block: Block, seen: Seen, *, shared: bool) -> MixtureLayout:
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
    assert all(routed), "split experts are plain MLPs"
    return MixtureLayout(
        f"the experts of {block.name}",
        mixture,
        owner,
        norms,
        returns_of(owner, seen),
        tuple(expert for expert in routed if expert is not None),
        _shared_experts(block) if shared else None,
        tuple(x for x in _owners_of_shared(block) if x is not owner),
    )


def _owners_of_shared(block: Block) -> list[nn.Module]:
    """Children of the block that hold projections of shared experts."""
    shared = [x.name for x in block.linears if x.sublayer == "experts" and x.expert is None]
    paths = dict.fromkeys(name.removeprefix(f"{block.name}.").partition(".")[0] for name in shared)
    return [block.module.get_submodule(path) for path in paths]


def _shared_experts(block: Block) -> SublayerLayout | None:
    """Layout of the shared experts of a block in channels, if they are a plain MLP."""
    linears = [x for x in block.linears if x.sublayer == "experts" and x.expert is None]
    return plain_mlp(f"the shared experts of {block.name}", linears)
